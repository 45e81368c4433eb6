"""Computes steps on the device: small ones as one graph, large ones layer by layer while experts stream in.

Owns the program, its buffers and the launcher. The host waits once a step, for its tokens; logits stay on the device
but for the rows that somebody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_engine.experts.device_streams import Mark
from expertd_engine.kernels.cuda.draw import Drawing
from expertd_engine.kernels.cuda.host_experts import Mailbox
from expertd_engine.kernels.cuda.resolve import ExpertScratch, TablePointers
from expertd_engine.kernels.given import hand_over
from expertd_engine.model.cuda_build import DeviceParts
from expertd_engine.model.cuda_experts import GivenRoutes, Stage, StagedExperts, TableExperts
from expertd_engine.model.cuda_graph import EagerLauncher, GraphLauncher, Launcher, bucket_of
from expertd_engine.model.cuda_inputs import StepInputs
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_program import ProgramRoom, query_tiles
from expertd_engine.model.cuda_virtual import Told, VirtualWork
from expertd_engine.model.sampler import Draw
from expertd_engine.model.step_rows import StepRows


class Table(Protocol):
    """Where experts lie, as the device knows it."""

    @property
    def pointers(self) -> TablePointers: ...

    @property
    def held(self) -> Tensor:
        """int32 `[layers, experts]`: 1 for those that virtual mode may route to, else 0."""
        ...

    def apply(self) -> None:
        """Launch what has changed since the step before; captured as a step's first work."""
        ...


class StageSource(Protocol):
    """Who brings experts of steps that run layer by layer."""

    def stage(self, *, held_alone: bool) -> AbstractContextManager[Stage]: ...
    def scanned(self, pairs: Sequence[Sequence[int]]) -> None: ...


class ExpertSource(StageSource, Protocol):
    """Who moves experts while steps run: `experts.device_cache.DeviceCache`."""

    @property
    def by_layer(self) -> bool:
        """Every step is staged."""
        ...

    def before_launch(self, *, may_ask: bool) -> bool:
        """Whether the launch is to ask the processor for what it misses; `may_ask`: there is a program that does."""
        ...

    def after_launch(self) -> Mark:
        """By the mark all that was given to the device has ended."""
        ...

    def poll(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device model is made for. `buckets` are the numbers of rows that run as one graph."""

    buckets: Sequence[int]
    step_tokens: int
    sequences: int
    model_len: int

    @property
    def rows(self) -> int:
        return max(self.step_tokens, self.buckets[-1])


@dataclass(frozen=True, slots=True)
class StepTokens(StepRows):
    """What a step on a device is told. Of one that begins behind another of few rows, an id of -1 - r is the token that
    row r of that one brings."""

    read: frozenset[int] = frozenset()
    """Places in `logit_rows` whose logits are read; of the others the token is all."""
    routes: NDArray[np.int64] | None = None
    """`[rows, layers, top_k]`, in the place of the routers' choices."""
    limits: Sequence[float] | None = None
    """In virtual mode: of each row, the share of its weights that may be substituted in a layer."""
    draws: Mapping[int, Draw] = field(default_factory=dict)
    """By row of the step, of those of `logit_rows` that draw their token on the device."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """`tokens[i]` is what `logit_rows[i]` draws, or the token with its highest logit; `logits[i]` float32 `[V]`, where
    read. `told`: of a step of virtual mode."""

    tokens: list[int]
    logits: dict[int, Tensor]
    told: Told | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A step of few rows that was launched."""

    tokens: StepTokens
    turn: int
    """Where its tokens will be."""
    told: Told | None
    ended: Mark


class DeviceModel:
    """One model on one device. Called by one thread, on the stream that was current when it was made."""

    def __init__(
        self, parts: DeviceParts, kv: DeviceKV, table: Table, limits: Limits, *, given_routes: bool = False,
        invariant: bool = False, mailbox: Mailbox | None = None, virtual: bool = False,
    ) -> None:  # fmt: skip
        """Graphs are captured here. `given_routes`: steps bring routes in the routers' place. `invariant`: see
        `cuda_program.DenseSide`. `mailbox`: the processor may compute what small steps miss. Those that ask it, and
        those of virtual mode, if `virtual` says that there are any, have graphs of their own."""
        device, layouts, dtype = parts.dense.device, parts.layouts, parts.dtype
        blocks = -(-limits.model_len // kv.block_tokens)
        self._limits, self._device, self._table = limits, device, table
        self._inputs = StepInputs(limits.rows, limits.sequences, blocks, device)
        hidden, few = layouts[0].hidden, limits.buckets[-1]
        logits = torch.empty(few, parts.dense.vocabulary, device=device)
        alone = limits.rows if invariant else few
        room = ProgramRoom(kv, self._inputs, logits, hidden, limits.rows, alone, dtype)
        self._program = parts.dense.program(room, invariant=invariant)
        self._tokens = torch.zeros(limits.rows, dtype=torch.int64, device=device)
        self._tokens_host = torch.zeros(2, few, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._token_numbers = self._tokens_host.numpy()
        self._draw = Drawing(few, parts.dense.vocabulary, device)
        self._logits_host = torch.zeros(few, parts.dense.vocabulary, pin_memory=device.type == "cuda")
        self._given = [
            GivenRoutes(len(layouts), rows, parts.top_k, device) if given_routes else None
            for rows in (few, limits.rows)
        ]
        inner = max(layout.inner for layout in layouts)
        self.virtual = VirtualWork(table.held, self._inputs, parts.top_k, few) if virtual else None

        def scratches(width: Callable[[int], int]) -> dict[int, ExpertScratch]:
            return {
                bucket: ExpertScratch.of(
                    hidden=hidden, inner=inner, max_rows=bucket, top_k=width(bucket), num_experts=parts.experts,
                    dtype=dtype, device=device,
                )
                for bucket in limits.buckets
            }  # fmt: skip

        pointers, num_rows = table.pointers, self._inputs.num_rows
        own = scratches(lambda _: parts.top_k)
        reading = TableExperts(layouts, pointers, own, num_rows, self._given[0])
        pairs = limits.rows * parts.top_k
        self._many = StagedExperts(
            layouts, parts.experts, torch.empty(pairs, inner, dtype=dtype, device=device),
            torch.empty(pairs, hidden, device=device), self._given[1], invariant=invariant,
        )  # fmt: skip
        self.is_graph = is_graph = parts.dense.is_graph and device.type == "cuda"
        """Whether a step of few rows is one launch, which never waits for the host."""
        self._launcher = self._made_launcher(partial(self._run_few, reading), is_graph=is_graph)
        self._asking_launcher: Launcher | None = None
        if mailbox is not None:
            asking = TableExperts(layouts, pointers, own, num_rows, self._given[0], mailbox)
            self._asking_launcher = self._made_launcher(partial(self._run_few, asking), is_graph=is_graph)
        if self.virtual is not None:
            among = scratches(self.virtual.width)
            self._few_virtual = TableExperts(layouts, pointers, among, num_rows, None)
            self._virtual_launcher = self._made_launcher(self._run_virtual, is_graph=is_graph)

    @torch.inference_mode()
    def step(self, tokens: StepTokens, experts: ExpertSource) -> StepOutcome:
        """Compute one step. Raises torch.OutOfMemoryError, and what `experts` raises; the next step can run then."""
        if self.is_small(tokens, experts):
            running = self.begin(tokens, experts)
            self.wait(running, experts.poll)
            return self.outcome(running)
        return self.step_by_layers(tokens, experts)

    def is_small(self, tokens: StepTokens, experts: ExpertSource) -> bool:
        """Whether the step is one launch, which can be waited for; `step` alone computes the others."""
        return len(tokens.ids) <= self._limits.buckets[-1] and not experts.by_layer

    @torch.inference_mode()
    def begin(self, tokens: StepTokens, experts: ExpertSource) -> Running:
        """Launch a small step, behind the one before if that has not ended, but not behind two. Raises as `step`."""
        virtual = None if tokens.limits is None else self.virtual
        asks = experts.before_launch(may_ask=virtual is None and self._asking_launcher is not None)
        turn = self._fill(tokens)  # only now, since copies may have been begun
        if self._given[0] is not None and tokens.routes is not None:
            self._given[0].fill(tokens.routes)
        launcher = self._launcher if virtual is None else self._virtual_launcher
        if asks and virtual is None and self._asking_launcher is not None:
            launcher = self._asking_launcher
        launcher.launch(bucket_of(len(tokens.ids)))
        for place in tokens.read:  # sent behind the step, not fetched after it: that would be one more wait
            row = tokens.logit_rows[place]
            self._logits_host[row].copy_(self._program.logits[row], non_blocking=True)
        told = None if virtual is None else virtual.send(len(tokens.ids))
        return Running(tokens, turn, told, experts.after_launch())

    def wait(self, running: Running, meanwhile: Callable[[], None]) -> None:
        """Until it has ended. `meanwhile` is called again and again, at least once."""
        meanwhile()
        while not running.ended.done():
            meanwhile()

    def outcome(self, running: Running) -> StepOutcome:
        """Of a step that has ended, asked for before the next but one begins; if logits are read, before the next."""
        tokens, chosen = running.tokens, self._token_numbers[running.turn]
        logits = {place: self._logits_host[tokens.logit_rows[place]].clone() for place in tokens.read}
        return StepOutcome([int(chosen[row]) for row in tokens.logit_rows], logits, running.told)

    def _fill(self, tokens: StepTokens) -> int:
        return self._inputs.fill(tokens.ids, tokens.positions, tokens.spans, tokens.limits or (), tokens.draws)

    def _made_launcher(self, program: Callable[[int], None], *, is_graph: bool) -> Launcher:
        self._inputs.fill((), (), ())
        with torch.inference_mode():
            if is_graph:
                return GraphLauncher(program, self._limits.buckets)
            return EagerLauncher(program, self._limits.buckets, self._device)

    def _run_few(self, experts: TableExperts, rows: int) -> None:
        """What a graph is captured of."""
        self._take(self._given[0])
        self._program.run_layers(rows, experts)
        experts.finish(rows)
        self._run_head(rows)

    def _run_virtual(self, rows: int) -> None:
        """The same in virtual mode."""
        assert self.virtual is not None
        self._take(None)
        self.virtual.forget(rows)
        self._program.run_layers(rows, self._few_virtual, virtual=self.virtual)
        self._few_virtual.finish(rows)
        self._run_head(rows)

    def _take(self, given: GivenRoutes | None) -> None:
        """What the host has left for this launch."""
        self._table.apply()
        self._inputs.take(self._tokens)
        if given is not None:
            given.take()

    def _run_head(self, rows: int) -> None:
        logits = self._program.run_head(self._program.hidden[:rows], self._tokens)
        self._draw(logits, self._tokens, self._inputs.draws)
        hand_over(self._tokens[:rows], self._tokens_host, self._inputs.turn)

    @torch.inference_mode()
    def step_by_layers(self, tokens: StepTokens, experts: StageSource) -> StepOutcome:
        """Compute a step of any number of rows while its experts come. Raises as `step`."""
        self._fill(tokens)
        program, rows = self._program, len(tokens.ids)
        self._inputs.take(self._tokens)
        if self._given[1] is not None and tokens.routes is not None:
            self._given[1].fill(tokens.routes)
            self._given[1].take()
        tiles = torch.tensor(query_tiles(tokens.spans), dtype=torch.int32).to(self._device, non_blocking=True)
        virtual = None if tokens.limits is None else self.virtual
        with experts.stage(held_alone=virtual is not None and min(tokens.limits or ()) >= 1) as staging:
            self._many.begin(staging)
            if virtual is not None:
                virtual.forget(rows)
            program.run_layers(rows, self._many, tiles, virtual)
            told = None if virtual is None else virtual.send(rows)
            chosen, logits = self._large_head(tokens)
        experts.scanned(self._many.counts.tolist())
        return StepOutcome(chosen, logits, told)

    def _large_head(self, tokens: StepTokens) -> tuple[list[int], dict[int, Tensor]]:
        """The head over the rows that are asked about, as many at a time as there is room for. Waits for its tokens."""
        chosen: list[int] = []
        logits: dict[int, Tensor] = {}
        room = len(self._program.logits)
        for first in range(0, len(tokens.logit_rows), room):
            wanted = torch.tensor(tokens.logit_rows[first : first + room]).to(self._device)
            made = self._program.run_head(self._program.hidden[wanted], self._tokens)
            if tokens.draws:
                temperatures, least, words = (each[wanted] for each in self._inputs.draws)
                self._draw(made, self._tokens, (temperatures, least, words))
            chosen += self._tokens[: len(wanted)].tolist()
            logits |= {first + i: made[i].cpu() for i in range(len(wanted)) if first + i in tokens.read}
        return chosen, logits
