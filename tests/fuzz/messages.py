"""Frames that are nearly messages: each is refused by the codec or taken, and the engine's core lives on."""

from __future__ import annotations

from random import Random

import msgspec

from expertd_engine.messages import (
    Abort,
    BudgetSet,
    Constraint,
    Fatal,
    Finished,
    Output,
    Progress,
    Ready,
    Sampling,
    SequenceStats,
    SetBudget,
    Shutdown,
    Steps,
    Submit,
    TextInput,
    ToEngine,
    ToServer,
)
from fuzz.mutate import garbled, mutated
from support.builders_core import Told, make_core, make_scheduler, run_to_end
from support.fake_numbers import engine_info, snapshot

TO_ENGINE: tuple[ToEngine, ...] = (
    Submit(7, [TextInput([1, 2, 3])], Sampling(max_tokens=4, logprobs=1, prompt_logprobs=1, bad_words=[[1], [2, 3]])),
    Submit(8, [TextInput([4])], Sampling(constraint=Constraint("regex", "a+")), mode="virtual", cache_salt="x"),
    Submit(9, [TextInput([4] * 20), TextInput([5])], Sampling(logit_bias={1: 2.0}, allowed_token_ids=[1])),
    Abort([7, 8]),
    SetBudget(4096),
    Shutdown(),
)
TO_SERVER: tuple[ToServer, ...] = (
    Progress("load", 0.5),
    Ready(engine_info()),
    Steps(
        [Output(1, [5, 6], None, None, 2)],
        [Finished(1, "stop", 6, stats=SequenceStats(queue_s=0.1)), Finished(2, "error", error="x", refused=True)],
        [1, 2],
    ),
    BudgetSet(4096, 4096, "no"),
    snapshot(3),
    Fatal(5, "gone"),
)


def frame_of(message: ToEngine | ToServer, rng: Random) -> bytes:
    """The message's frame with something wrong in its structure, or in its bytes."""
    encoded = msgspec.msgpack.encode(message)
    if rng.random() < 0.2:
        return garbled(encoded, rng)
    while True:
        try:
            return msgspec.msgpack.encode(mutated(msgspec.msgpack.decode(encoded, strict=False), rng))
        except OverflowError:  # an integer that no frame can hold
            continue


def try_engine(seed: int) -> bool:
    """One nearly right frame to an engine that has something to do: whether it was taken for a message."""
    rng = Random(seed)
    frame = frame_of(rng.choice(TO_ENGINE), rng)
    try:
        message: ToEngine = msgspec.msgpack.decode(frame, type=ToEngine)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    core, told = make_core(make_scheduler(max_model_len=64, num_blocks=20)), Told()
    core.submit(Submit(1, [TextInput([5, 6])], Sampling(max_tokens=3)), 0.0)
    told.take(core.step(0.0))
    if isinstance(message, Submit) and message.sequence_id != 1:
        core.submit(message, 0.0)
    elif isinstance(message, Abort):
        core.abort(message.sequence_ids, 0.0)
    run_to_end(core, told, max_steps=500)
    assert told.finished.keys() >= {1}
    return True
