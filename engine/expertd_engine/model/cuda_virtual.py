"""Virtual mode on a device: what its kernels are given and leave behind, and what is told of that.

Masks, sums of what was asked for and substituted mass lie in the device's memory, where a captured step finds them; the
host reads them when the step has ended, and moves experts for the steps after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_engine.experts.device_held import DeviceHeld
from expertd_engine.kernels.cuda.resolve import LARGEST_PAIRS
from expertd_engine.kernels.cuda.substitute import MET, Among
from expertd_engine.model.cuda_inputs import StepInputs
from expertd_engine.model.substitution import SHARED_BY, Floats, widest
from expertd_engine.model.virtual_counts import VirtualCounts
from expertd_engine.sequence_stats import Substitutions


@dataclass(frozen=True, slots=True)
class Told:
    """What a step's kernels left."""

    asked: Floats
    """`[layers, experts]`: ‖x‖ · weight that the routers themselves gave each expert."""
    met: Floats
    """`[rows, layers, MET]`"""


class VirtualWork:
    """Room for steps of as many rows as `inputs` has. In steps of up to `few` rows choices are shared by `SHARED_BY`
    where their pairs can be sorted, in larger ones by one: their memory was measured for `top_k` a row."""

    def __init__(self, held: Tensor, inputs: StepInputs, top_k: int, few: int) -> None:
        """`held` int32 `[layers, experts]`, on the device: 1 for those that rows may be sent to, else 0."""
        layers, experts = held.shape
        device, rows = held.device, inputs.rows
        self._held, self._inputs, self._top_k, self._few = held, inputs, top_k, few
        count = layers * experts
        self._left = torch.zeros(count + rows * layers * MET, device=device)
        self._hosts = [torch.zeros(len(self._left), pin_memory=device.type == "cuda") for _ in range(2)]
        self._turn = 0
        self._asked = self._left[:count].view(layers, experts)
        self._met = self._left[count:].view(rows, layers, MET)
        told = [host.numpy() for host in self._hosts]
        self._told = [Told(t[:count].reshape(self._asked.shape), t[count:].reshape(self._met.shape)) for t in told]
        self._counted = torch.zeros(rows, experts, device=device)
        pairs = max(rows * top_k, *(size * self.width(size) for size in range(1, few + 1)))
        self._experts = torch.zeros(pairs, dtype=torch.int32, device=device)
        self._weights = torch.zeros(pairs, device=device)

    def width(self, rows: int) -> int:
        """Experts a row in steps of so many."""
        return widest(self._top_k, self._shared_by(rows))

    def among(self, moe: int, rows: int) -> Among:
        """What the router of MoE layer `moe` is given for a step of `rows` rows."""
        width = self.width(rows)
        return Among(
            held=self._held[moe],
            counted=self._counted[:rows],
            limits=self._inputs.limits[:rows],
            num_rows=self._inputs.num_rows,
            asked=self._asked[moe],
            met=self._met[:rows, moe],
            experts=self._experts[: rows * width].view(rows, width),
            weights=self._weights[: rows * width].view(rows, width),
            shared_by=self._shared_by(rows),
        )

    def forget(self, rows: int) -> None:
        """The first work of a step of so many rows: nothing has been asked for. A lone row leaves that by itself."""
        if rows > 1:
            self._asked.zero_()

    def send(self, rows: int) -> Told:
        """Behind a step of so many rows: have what it left sent to the host. It is there once the device has come past
        it, and stands until the next but one is sent."""
        self._turn = 1 - self._turn
        count = self._asked.numel() + rows * self._met[0].numel()
        self._hosts[self._turn][:count].copy_(self._left[:count], non_blocking=True)
        told = self._told[self._turn]
        return Told(told.asked, told.met[:rows])

    def _shared_by(self, rows: int) -> int:
        return SHARED_BY if rows <= self._few and rows * widest(self._top_k, SHARED_BY) <= LARGEST_PAIRS else 1


class DeviceVirtual:
    """Counts what virtual steps did to their rows, and lets held sets follow; as `VirtualRouting` on a processor."""

    def __init__(self, held: DeviceHeld, norms: Sequence[NDArray[np.float32]], top_k: int) -> None:
        """`norms`: of each layer's experts."""
        self.held = held
        self._top_k, self._tokens = top_k, 0
        self._met = np.zeros((len(norms), MET))
        """Summed over rows, since start, but for what is `_uncounted`."""
        self._uncounted: list[Floats] = []
        self._norms = np.zeros((len(norms), max(map(len, norms))), np.float32)
        for layer, row in enumerate(norms):
            self._norms[layer, : len(row)] = row

    def end_step(self, told: Told, lengths: Sequence[int]) -> list[Substitutions]:
        """A virtual step over sequences of so many rows each has ended, well: what it did to each. All that need not be
        told at once is left for while the next step runs."""
        rows = sum(lengths)
        self._tokens += rows
        self._uncounted.append(told.met)
        self.held.digest(partial(self._importance, told), rows / max(1, len(lengths)))
        ends = accumulate(lengths)
        return [self._done_to(told.met[end - count : end]) for count, end in zip(lengths, ends, strict=True)]

    @property
    def counts(self) -> VirtualCounts:
        """Since start."""
        self._count()
        replaced, mass, fetched = self._met.T
        activations = [self._tokens * self._top_k] * len(self._met)
        return VirtualCounts(activations, list(map(int, replaced)), mass.tolist(), self._tokens, int(fetched.sum()))

    def _importance(self, told: Told) -> Floats:
        """`[layers, experts]`, while the next step runs."""
        self._count()
        return told.asked * self._norms

    def _count(self) -> None:
        for met in self._uncounted:
            self._met += met.sum(axis=0)
        self._uncounted.clear()

    def _done_to(self, met: Floats) -> Substitutions:
        """To one sequence."""
        rows, layers, _ = met.shape
        replaced, mass, _ = np.add.reduce(met.reshape(-1, MET)).tolist()
        return Substitutions(rows * layers * self._top_k, int(replaced), mass / layers, rows)
