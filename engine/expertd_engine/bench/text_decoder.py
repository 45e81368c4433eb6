"""An engine in this process that continues text, by sampling, so that routes are those of text. Owns the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from expertd_engine.bench.generated import GeneratedRoutes
from expertd_engine.bench.routing import Routing
from expertd_engine.bench.turns import turns_of
from expertd_engine.config import Config
from expertd_engine.console import silent
from expertd_engine.core import Forward, StepResult
from expertd_engine.errors import EngineError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import ExpertMode, Sampling, Submit, TextInput
from expertd_engine.model.runner import Onlooker, Runner
from expertd_engine.startup import start_engine
from expertd_engine.startup_parts import device_of
from expertd_engine.step_plan import StepPlan

if TYPE_CHECKING:
    from expertd_engine.model.cuda_runner import DeviceRunner

PROMPT = 64
WARM = 32
"""Tokens of each stream that are not timed."""
_AT_ONCE = 8
"""Tokens of a turn that are timed."""


def longest(tokens: int, warm: int = WARM) -> int:
    """Tokens that a sequence may reach in a window: one beside the timed one may be ahead of it."""
    return PROMPT + 4 * (warm + tokens)


@dataclass(slots=True)
class Timed:
    """Windows of one contender."""

    name: str
    means_s: list[float] = field(default_factory=list)
    """Of each window: seconds a token."""
    gaps_s: list[float] = field(default_factory=list)
    """Between tokens, all windows."""
    stall_s: float = 0.0
    """In steps of the timed stream's mode."""
    missed: list[list[int]] = field(default_factory=list)
    """By timed token: experts that each MoE layer lacked."""
    lookups: int = 0
    """Of timed tokens."""
    choices: int = 0
    substituted: int = 0

    @property
    def hit_rate(self) -> float:
        """Of timed tokens' lookups."""
        return 1 - sum(map(sum, self.missed)) / max(1, self.lookups)


class Window:
    """Streams of one engine, the first of which is timed while it goes on: between, others may have the box."""

    def __init__(
        self, decoder: Decoder, mode: ExpertMode, timed: int, others: Sequence[int], into: Timed
    ) -> None:  # fmt: skip
        self._decoder, self._mode, self._timed, self._others, self._into = decoder, mode, timed, others, into
        self._gaps: list[float] = []

    def go_on(self, tokens: int, unseen: int = 0) -> None:
        """Time so many more tokens, after `unseen` others."""
        decoder, into = self._decoder, self._into
        decoder.times(self._timed, unseen)
        before, times = decoder.told(self._mode), [time.perf_counter()]
        while len(times) <= tokens:
            missed = decoder.missed()
            times += decoder.times(self._timed, 1)
            into.missed.append([now - then for now, then in zip(decoder.missed(), missed, strict=True)])
        stall_s, lookups, choices, substituted = (
            now - then for now, then in zip(decoder.told(self._mode), before, strict=True)
        )  # fmt: skip
        into.stall_s += stall_s
        into.lookups += int(lookups)
        into.choices += int(choices)
        into.substituted += int(substituted)
        self._gaps += [later - earlier for earlier, later in pairwise(times)]

    def end(self) -> None:
        """All of its streams end."""
        self._decoder.abort([self._timed, *self._others])
        self._into.means_s.append(fmean(self._gaps))
        self._into.gaps_s += self._gaps


class Decoder:
    """One engine that continues text; with `routing`, its tokens are sent along generated routes."""

    def __init__(
        self, store: ExpertStore, config: Config, prompts: Sequence[Sequence[int]], routing: Routing | None = None
    ) -> None:
        """Raises what starting an engine raises."""
        self._stalls_s: dict[ExpertMode, float] = {"exact": 0.0, "virtual": 0.0}
        self._routes = None if routing is None else GeneratedRoutes(routing)
        self._engine = self._started(store, config)
        self._experts = [layer.num_experts for layer in store.index.layers]
        self._prompts = prompts
        self._next_id = 1

    def _started(self, store: ExpertStore, config: Config) -> Any:
        device = device_of(config, store.index)
        if device is None:
            return start_engine(store, config, os.getpid(), silent, self._watch, routes=self._routes)
        from expertd_engine.device_startup import start_on_device  # its kernels need what a box without a card lacks

        return start_on_device(store, config, os.getpid(), silent, self._watch, device, routes=self._routes)

    def close(self) -> None:
        self._engine.cache.close()

    def onlooker(self, onlooker: Onlooker) -> None:
        """Let it see the routes of all steps to come."""
        self._engine.runner.onlookers = [*self._engine.runner.onlookers, onlooker]

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return int(self._engine.info.expert_bytes_total)

    @property
    def budget_bytes(self) -> int:
        """For experts, now."""
        return int(self._engine.cache.ledger.budget_bytes)

    @property
    def holds_all(self) -> bool:
        """Whether the budget has room for every expert."""
        return self.budget_bytes >= self.expert_bytes

    def refill(self) -> None:
        """Have every expert resident, in a budget that holds them all, as after long service."""
        cache = self._engine.cache
        cache.set_budget(self._engine.info.expert_bytes_total)
        cache.begin_step([])
        for layer, count in enumerate(self._experts):
            with cache.lease(layer, range(count), pairs=[1] * count) as leases:
                left = count
                while left:
                    taken = leases.take()
                    leases.release([index for index, _ in taken])
                    left -= len(taken)
        cache.end_step()

    def set_budget(self, expert_bytes: int) -> None:
        self._engine.cache.set_budget(expert_bytes)

    def window(self, modes: Sequence[ExpertMode], tokens: int, into: Timed, warm: int = WARM) -> None:
        """Time `tokens` of a stream of the first mode after `warm`, with one of each of the others beside it."""
        window = self.opened(modes, tokens, into, warm)
        window.go_on(tokens)
        window.end()

    def opened(self, modes: Sequence[ExpertMode], tokens: int, into: Timed, warm: int = WARM) -> Window:
        """As `window`, whose `tokens` are yet to be asked for; there may be a quarter more of them, not timed."""
        timed, *others = [self._submit(each, warm + tokens) for each in modes]
        if self._routes is not None:
            self._routes.reserve(PROMPT + warm + tokens + tokens // 4 + 2)
        self.times(timed, warm)
        return Window(self, modes[0], timed, others, into)

    def times(self, sequence_id: int, tokens: int) -> list[float]:
        """When each of its next tokens was there."""
        times: list[float] = []
        while len(times) < tokens:
            told = self._engine.core.step(time.perf_counter())
            for finished in told.finished:
                raise EngineError(f"a measured sequence ended: {finished.error or finished.reason}")
            times += [time.perf_counter() for output in told.outputs if output.sequence_id == sequence_id]
        return times

    def told(self, mode: ExpertMode) -> tuple[float, int, int, int]:
        """Since start: seconds that steps of this mode stood still, lookups, choices of virtual steps, and how many of
        those were substituted."""
        counters, virtual = self._engine.cache.ledger.counters, self._engine.runner.virtual
        counts = None if virtual is None else virtual.counts
        choices, substituted = (0, 0) if counts is None else (sum(counts.activations), sum(counts.substituted))
        return self._stalls_s[mode], int(counters.lookups()), choices, substituted

    def missed(self) -> list[int]:
        """Lookups of each MoE layer that did not find their expert, since start."""
        counters = self._engine.cache.ledger.counters
        return [late + missed for late, missed in zip(counters.late, counters.misses, strict=True)]

    def abort(self, sequence_ids: Sequence[int]) -> None:
        """End these, and all steps that are left to do."""
        core = self._engine.core
        core.abort(sequence_ids, time.perf_counter())
        while core.has_work:
            core.step(time.perf_counter())

    def _submit(self, mode: ExpertMode, tokens: int) -> int:
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        prompt = list(self._prompts[sequence_id % len(self._prompts)][:PROMPT])
        how = Sampling(max_tokens=4 * tokens, temperature=1.0, seed=sequence_id, ignore_eos=True)
        self._engine.core.submit(Submit(sequence_id, [TextInput(prompt)], how, mode=mode), time.perf_counter())
        return sequence_id

    def _watch(self, runner: Runner | DeviceRunner) -> Forward:
        """Told by mode what steps stood still."""
        runner.beginning = self._announce

        def forward(plan: StepPlan) -> StepResult:
            stalls = self._engine.cache.stalls
            before = stalls.total_s
            result = runner(plan)
            self._stalls_s[plan.mode] += stalls.total_s - before
            return result

        return forward

    def _announce(self, plan: StepPlan) -> None:
        """Whose rows come."""
        if self._routes is not None:
            self._routes.begin_step([(0, chunk.num_tokens) for chunk in plan.chunks])


def take_turns(pair: int, tokens: int, *contenders: tuple[Decoder, ExpertMode, Timed]) -> None:
    """Time so many tokens of two, moments apart: what else the box does meets both alike. The first token of a turn,
    which finds the other's bytes in the caches, is not timed. `pair` says, as chance does, who begins."""
    windows = [decoder.opened([mode], tokens, timed) for decoder, mode, timed in contenders]
    blocks = [_AT_ONCE] * (tokens // _AT_ONCE) + [tokens % _AT_ONCE] * (tokens % _AT_ONCE > 0)
    left = [iter(blocks) for _ in windows]
    for which in turns_of(pair, len(blocks), 1):
        windows[which].go_on(next(left[which]), unseen=1)
    for window in windows:
        window.end()
