"""A real engine in this process, as it serves, and what its steps come to: scheduler, core, ledger and kernels.

What a window counts begins when all its streams decode.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import torch

from expertd_engine.bench.channel import PREDICTORS
from expertd_engine.bench.disk import read_bandwidth
from expertd_engine.bench.engine_spec import config_of, generated, opened
from expertd_engine.bench.generated import ChannelLookahead, Recorder, Seen
from expertd_engine.bench.protocol import (
    Decoded,
    DecodeRequest,
    DiskRead,
    EngineFacts,
    EngineSpec,
    Prefilled,
    PrefillRequest,
)
from expertd_engine.bench.routing import shape_of
from expertd_engine.bench.streams import Streams
from expertd_engine.bench.turns import Switch
from expertd_engine.bench.yardstick import Replayed, Yardstick
from expertd_engine.console import silent
from expertd_engine.core import Forward, StepResult
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.payoff import PayOff
from expertd_engine.experts.store import ExpertStore
from expertd_engine.kernels import library
from expertd_engine.memory import peak_rss_bytes
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.startup import start_engine
from expertd_engine.startup_experts import lookahead_for
from expertd_engine.step_plan import StepPlan


class EngineSession:
    """One engine, its generated routes, and its yardstick."""

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the engine. Raises what `start_engine` raises."""
        self._spec = spec
        self._store = opened(spec)
        self._shape = shape_of(self._store.index)
        self._routes, channel = generated(spec, self._shape)
        foresight = ChannelLookahead(self._routes, channel) if self._routes and channel else NoLookahead()
        self._recorder = Recorder(foresight, self._shape)
        self._seen = Seen() if spec.hints in PREDICTORS else None
        """In the recorder's place where the engine foresees for itself."""
        self._counts = ExpertCounts()
        self._outcomes: dict[str, int] = {}
        """Bytes of prefetches by outcome, when they were last told."""
        self._switch: Switch | None = None
        self._engine = self._started()
        self._streams = Streams(self._engine.core, self._engine.info.vocab_size, spec.seed, self._routes)
        if self._seen is not None:
            self._engine.runner.onlookers = [*self._engine.runner.onlookers, self._seen]
        self._yardstick = Yardstick(self._store, self._shape, self._engine.cache.ledger.budget_bytes)

    def close(self) -> None:
        self._engine.cache.close()

    def _started(self) -> Any:
        """The engine: its parts are what this class and its kin know of them."""
        return start_engine(
            self._store, config_of(self._spec), os.getpid(), silent, self._watch,
            lookahead=None if self._seen else self._recorder, routes=self._routes,
        )  # fmt: skip

    # ------------------------------------------------------------ what can be asked

    def describe(self) -> EngineFacts:
        info, index = self._engine.info, self._store.index
        return EngineFacts(
            experts_total=index.expert_bytes_total(),
            expert_budget=self._engine.cache.ledger.budget_bytes,
            record=index.record_bytes(0),
            dense_read=_dense_read_bytes(self._store),
            experts_format=index.experts_format,
            dense_format=index.dense_format,
            layers=self._shape.layers,
            experts=self._shape.experts,
            top_k=self._shape.top_k,
            policy=info.policy,
            lookahead=info.lookahead,
            numerics=info.numerics,
            fallbacks=info.fallbacks,
            device=f"cpu, {torch.get_num_threads()} threads, {_kernels()}",
        )

    def disk(self, seconds: float) -> DiskRead:
        return read_bandwidth(self._store, self._spec.io_threads, seconds, self._spec.seed)

    def decode(self, request: DecodeRequest) -> Decoded:
        """Time `tokens` steps of all streams, after their prompts and `warm` steps."""
        self._load_all()
        steps = request.warm + request.tokens
        streams = self.start(request.prompt, steps)
        met = self.window(request.warm, request.tokens, len(streams))
        self.end(streams)
        return met

    def foresee(self, on: bool) -> None:
        """Go on with what is foreseen, or as if nothing were; for engines that foresee."""
        if self._switch is None:
            engine = self._engine
            plain = lookahead_for(self._store.index, 2 * self._spec.io_threads, NoLookahead(), engine.cache.ledger)
            self._switch = Switch(engine.cache, engine.runner, plain)
            self._yardstick.expect()
        self._switch.turn(on)

    @property
    def payoff(self) -> PayOff | None:
        """Who tries whether foresight pays; None where nobody does, or foresight is taken away."""
        return cast(PayOff | None, self._engine.cache.payoff)

    def window(self, warm: int, tokens: int, streams: int) -> Decoded:
        """Time `tokens` steps of so many streams, all that there are, after `warm` others."""
        for _ in range(warm):
            self._streams.step()
        self._yardstick.replay()
        before = self._counts
        elapsed_s = sum(self._streams.step() for _ in range(tokens))
        found = self._found(self._counts - before, self._yardstick.replay(), tokens)
        return msgspec.structs.replace(found, elapsed_s=elapsed_s, tokens=tokens * streams)

    def steps(self, arms: Iterable[bool], streams: int) -> list[Decoded]:
        """Time one step of all streams after the other, each with foresight or without it, as `arms` says when its turn
        comes. What other caches make of them is found out afterwards: no step runs in memory that has just done that.
        """
        self._yardstick.replay()
        ran = []
        for on in arms:
            self.foresee(on)
            before, cpu_s = self._counts, time.thread_time()
            elapsed_s = self._streams.step()
            ran.append((elapsed_s, time.thread_time() - cpu_s, self._counts - before))
            if not on and self._switch is not None and self._seen is not None:
                self._switch.passed(self._seen.chosen)
        return [
            msgspec.structs.replace(self._found(met, replayed, 1), elapsed_s=elapsed_s, cpu_s=cpu_s, tokens=streams)
            for (elapsed_s, cpu_s, met), replayed in zip(ran, self._yardstick.replay_each(), strict=True)
        ]

    def _found(self, met: ExpertCounts, replayed: Replayed, steps: int) -> Decoded:
        """What so many steps came to, but for their time."""
        record = self._store.index.record_bytes(0)
        prefetched, wasted = self._prefetched()
        return Decoded(
            elapsed_s=0.0,
            tokens=0,
            hits=met.hits,
            late=met.late,
            misses=met.misses,
            missed_bytes=met.misses * record,
            transferred_bytes=met.loaded_bytes,
            stall_s=met.stall_s,
            lru_transferred_bytes=replayed.lru_misses * record,
            hardness=replayed.hardness,
            union=replayed.lookups / (steps * self._shape.layers),
            peak_bytes=self._engine.cache.ledger.peak_bytes,
            process_peak_bytes=peak_rss_bytes(),
            prefetched_bytes=prefetched,
            wasted_bytes=wasted,
        )

    def _prefetched(self) -> tuple[int, int]:
        """Bytes of prefetches that have ended since the last call, and of these wasted."""
        outcomes = dict(self._engine.cache.ledger.counters.prefetch_outcome_bytes)
        since = {name: nbytes - self._outcomes.get(name, 0) for name, nbytes in outcomes.items()}
        self._outcomes = outcomes
        return sum(since.values()) - since["cancelled"], since["wasted"]

    def prefill(self, request: PrefillRequest) -> Prefilled:
        """Time one prompt; with `decode`, while another stream decodes, whose pace is told before, during and after."""
        self._load_all()
        other = self._streams.start(request.warm, 3 * request.warm + request.tokens + request.after, 1)
        before_s = [self._streams.step() for _ in range(request.warm)]
        if not request.decode:
            self.end(other)
        resident, before = self._engine.cache.ledger.resident_bytes, self._counts
        prompt = self._streams.submit(request.tokens, 1, stream=self._spec.streams)
        during_s = self._streams.step_until([prompt], 1)
        met = self._counts - before
        after_s = [self._streams.step() for _ in range(request.after if request.decode else 0)]
        self.end(other if request.decode else [])
        self._yardstick.drop()
        return Prefilled(
            ttft_s=sum(during_s),
            transferred_bytes=met.loaded_bytes,
            resident_bytes=resident,
            peak_bytes=self._engine.cache.ledger.peak_bytes,
            process_peak_bytes=peak_rss_bytes(),
            before_s=before_s if request.decode else [],
            during_s=during_s if request.decode else [],
            after_s=after_s,
        )

    # ------------------------------------------------------------ steps

    def _watch(self, runner: Forward) -> Forward:
        """Around the runner: announces whose rows come, and keeps what a step met."""

        def forward(plan: StepPlan) -> StepResult:
            began = time.perf_counter()
            self._announce(plan)
            started = time.perf_counter()
            result = runner(plan)
            ended = time.perf_counter()
            self._counts += self._met(result)
            if plan.phase == "decode":
                self._yardstick.add(self._step_experts(plan))
            self._streams.own_s += started - began + time.perf_counter() - ended
            return result

        return forward

    def _announce(self, plan: StepPlan) -> None:
        """Whose rows come."""
        if self._routes:
            stream_of = self._streams.stream_of
            self._routes.begin_step([(stream_of[one.sequence.sequence_id], one.num_tokens) for one in plan.chunks])

    def _met(self, result: StepResult) -> ExpertCounts:
        """What a step met, `loaded_bytes` being all that was moved meanwhile."""
        return result.experts

    def _step_experts(self, plan: StepPlan) -> Sequence[Sequence[int]]:
        """The distinct experts that the plan, just run, asked for, by layer."""
        if self._routes:
            return [np.unique(chosen).tolist() for chosen in self._routes.announced.routes.swapaxes(0, 1)]
        return (self._seen or self._recorder).take_step()

    def start(self, prompt: int, tokens: int) -> list[int]:
        """Have all streams decode, with room for `tokens` each: their ids."""
        return self._streams.start(prompt, tokens, self._spec.streams)

    def end(self, sequence_ids: Sequence[int]) -> None:
        """The streams are done with."""
        self._streams.end(sequence_ids)

    def _load_all(self) -> None:
        """Where the budget holds every expert, see that every one is there: as a step would that uses them all."""
        cache, total = self._engine.cache, self._store.index.expert_bytes_total()
        if not cache.ledger.budget_bytes >= total > cache.ledger.resident_bytes:
            return
        cache.begin_step([])
        for layer, entry in enumerate(self._store.index.layers):
            left = entry.num_experts
            with cache.lease(layer, range(entry.num_experts)) as leases:
                while left:
                    taken = leases.take()
                    leases.release([index for index, _ in taken])
                    left -= len(taken)
        cache.end_step()


def _dense_read_bytes(store: ExpertStore) -> int:
    with store.dense_path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    is_tied = not any("lm_head" in name for name in header)
    read = [entry["data_offsets"] for name, entry in header.items() if is_tied or "embed_tokens" not in name]
    return sum(end - begin for begin, end in read)


def _kernels() -> str:
    """Which kernels compute the experts."""
    return "torch kernels" if library.why_missing() else f"{library.load().instruction_set} kernels"
