"""The same traces on the real engine: arms in turn on every trace, in real time, their experts read from disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from expertd_engine.bench.readme_record import CONTEXT, open_engine
from expertd_engine.bench.readme_sim import Arm, Outcome, Room
from expertd_engine.bench.readme_traces import Arrival
from expertd_engine.bench.stats import order_of
from expertd_engine.config import Config, Size
from expertd_engine.errors import EngineError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.startup import Engine


class RealArm:
    """One engine, kept over all traces."""

    def __init__(self, store: ExpertStore, arm: Arm, room: Room, threads: int | None, io_threads: int) -> None:
        config = Config(
            expert_budget=Size(bytes=room.slots * store.index.record_bytes(0)), max_model_len=CONTEXT,
            max_sequences=room.max_sequences, max_step_tokens=room.max_step_tokens, batching=arm.batching,
            expert_policy=arm.policy, prefetch=arm.prefetch, prefix_cache=False, threads=threads, io_threads=io_threads,
        )  # fmt: skip
        self.engine: Engine = open_engine(store, config, None)
        self._next_id = 0

    def run(self, trace: Sequence[Arrival]) -> tuple[Outcome, list[list[float]]]:
        """Serve the trace as it arrives. Also returns the log-probabilities of each answer's tokens.

        Raises EngineError where an answer is not the recorded one.
        """
        core, outcome = self.engine.core, Outcome()
        first, pending = self._next_id, deque(trace)
        self._next_id += len(trace)
        outcome.per_token_s, outcome.first_token_s = [0.0] * len(trace), [0.0] * len(trace)
        answers: list[list[int]] = [[] for _ in trace]
        logprobs: list[list[float]] = [[] for _ in trace]
        began = time.perf_counter()
        while pending or core.has_work:
            now = time.perf_counter() - began
            if not core.has_work and pending[0].at_s > now:
                time.sleep(pending[0].at_s - now)
            while pending and pending[0].at_s <= time.perf_counter() - began:
                self._submit(first + len(trace) - len(pending), pending.popleft())
            told = core.step(time.monotonic())
            now = time.perf_counter() - began
            for output in told.outputs:
                number = output.sequence_id - first
                answers[number] += output.token_ids
                logprobs[number] += [entry.logprob for entry in output.logprobs or ()]
                outcome.first_token_s[number] = outcome.first_token_s[number] or now - trace[number].at_s
            for finished in told.finished:
                number = finished.sequence_id - first
                outcome.per_token_s[number] = (now - trace[number].at_s) / len(trace[number].exchange.answer)
        if answers != [arrival.exchange.answer for arrival in trace]:
            raise EngineError("an answer is not the one that was recorded: budgets must never change tokens")
        return outcome, logprobs

    def _submit(self, sequence_id: int, arrival: Arrival) -> None:
        sampling = Sampling(temperature=0, max_tokens=len(arrival.exchange.answer), ignore_eos=True, logprobs=0)
        self.engine.core.submit(Submit(sequence_id, [TextInput(arrival.exchange.prompt)], sampling), time.monotonic())


def run_real(
    store: ExpertStore, arms: Sequence[Arm], room: Room, traces: Sequence[Sequence[Arrival]], threads: int | None,
    io_threads: int,
) -> list[list[Outcome]]:  # fmt: skip
    """By arm, then trace. Every trace goes through all arms before the next one begins, in turning order.

    Raises EngineError where arms do not agree on every bit of a log-probability, on a box that promises so.
    """
    real = [RealArm(store, arm, room, threads, io_threads) for arm in arms]
    outcomes: list[list[Outcome]] = [[] for _ in arms]
    try:
        for arm in real:  # first uses: memory, checksums
            arm.run(traces[0][: max(1, len(traces[0]) // 4)])
        for number, trace in enumerate(traces):
            seen: list[list[list[float]]] = []
            for place in order_of(len(arms), number):
                outcome, logprobs = real[place].run(trace)
                outcomes[place].append(outcome)
                seen.append(logprobs)
            if real[0].engine.info.numerics == "invariant" and any(one != seen[0] for one in seen):
                raise EngineError("log-probabilities differ between arms: budgets must never change a bit")
    finally:
        for arm in real:
            arm.engine.cache.close()
    return outcomes
