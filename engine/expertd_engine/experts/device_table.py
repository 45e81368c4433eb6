"""The table that kernels read: where every record is, which slots may be landed in, and what they report back.

Owner: the engine thread, which changes it at boundaries between launches only (`stage`, then `apply` as the first work
of a launch); inside a launch kernels publish what they landed, and the copies lane raises flags and `ready`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.experts.device_layout import TableLayout, Words
from expertd_engine.experts.device_streams import AddressMove, Device, Mark
from expertd_engine.experts.events import ExpertId
from expertd_engine.kernels.given import PART, apply_words

if TYPE_CHECKING:
    from expertd_engine.kernels.cuda.resolve import TablePointers

_UPDATE_WORDS = 2048
"""That one `apply` changes, a multiple of `PART`; a boundary of more is applied in several, outside of any graph."""
_MOST_LAYERS, _LAUNCHES = 2**14, 2**16
"""What `progress` tells layers and launches apart by."""


@dataclass(frozen=True, slots=True)
class Report:
    """What kernels said of one step: `seen` `[layers, U, 4]` and how many rows of it count, `[layers]`."""

    seen: np.ndarray[tuple[int, int, int], np.dtype[np.int32]]
    counts: np.ndarray[tuple[int], np.dtype[np.int32]]

    def layers(self) -> Iterator[tuple[int, list[list[int]]]]:
        """`(layer, [experts, sources, slots, pairs])` of the layers that met any."""
        for layer, count in enumerate(self.counts.tolist()):
            if count:
                yield layer, self.seen[layer, :count].T.tolist()


class DeviceTable:
    """A table on a device and its twins in pinned memory. `report_rows`: distinct experts of a layer in one step."""

    def __init__(self, layout: TableLayout, report_rows: int, device: Device) -> None:
        self.layout = layout
        self._device = device
        where = device.torch_device
        self._words = torch.zeros(layout.words, dtype=torch.int32, device=where)
        wide = self._words.view(torch.int64)
        experts = layout.layers * layout.experts
        self.entries = wide[: 2 * experts].view(layout.layers, layout.experts, 2)
        """int64 `[layers, experts, 2]`: the address to read, `HOME` among its bits if that is over the link; slot + 1
        while a copy into that slot is under way, else 0."""
        self.slot_address = wide[layout.slot_address // 2 :][: layout.slots]
        """int64 `[slots]`."""
        self.ready = self._words[layout.ready :][: layout.slots]
        """int32 `[slots]`: 1 when the copy under way is complete."""
        self.landing = self._words[layout.list :][: layout.landing]
        """int32 `[landing]`: slots that steps may land in, from `head` to `tail`, both counts that wrap."""
        self.head, self.tail = self._words[layout.head :][:1], self._words[layout.tail :][:1]
        self.held = self._words[layout.held :][:experts].view(layout.layers, layout.experts)
        """int32 `[layers, experts]`: 1 for those that virtual mode may route to, else 0."""
        self.launch = self._words[layout.launch :][:1]
        """int32 `[1]`: what `progress` is counted from in the running launch."""
        self.staged_launch = 0
        """`launch`, as it will be when what is staged has been applied."""
        rows = layout.layers * report_rows * 4
        self._report = torch.zeros(rows + layout.layers, dtype=torch.int32, device=where)
        self.seen = self._report[:rows].view(layout.layers, report_rows, 4)
        """int32 `[layers, U, 4]`: expert, source (`device_events`), slot landed in or -1 (of a shared one, the first
        neuron that the processor computes), pairs."""
        self.seen_count = self._report[rows:]
        """int32 `[layers]`: rows of `seen` that count."""
        self.progress = device.pinned(1, torch.int32)
        """int32 `[1]` in host memory: `launch` and the layers of the running step whose routes are known."""
        self._progress = self.progress.numpy()
        self._staged = device.pinned(2 * _UPDATE_WORDS, torch.int32).view(2, _UPDATE_WORDS)
        """Which words the next `apply` changes, and what they become; it reads them here, in the host's memory."""
        self._index, self._value = self._staged.numpy()
        self._index.fill(layout.unread)
        self._num_staged = 0
        self._staging = device.pinned(1, torch.int32)
        """Counts what was staged."""
        self._taken = device.pinned(_UPDATE_WORDS // PART, torch.int32)
        """Which of it each part of an `apply` has read last."""
        self._last_staged, self._last_taken = self._staging.numpy(), self._taken.numpy()
        self._applied = device.compute.mark()
        """By then what is staged was applied, at the latest."""
        self._host_report = [device.pinned(rows + layout.layers, torch.int32) for _ in range(2)]
        self._reports = [self._as_report(host.numpy()) for host in self._host_report]
        self._turn = 0
        self._numbers = device.pinned(layout.slots + 1, torch.int64)
        self._numbers.copy_(torch.arange(layout.slots + 1))
        self._one = device.pinned(1, torch.int32).fill_(1)
        self._yes = self._one.data_ptr()
        self._first_entry, self._first_ready = self.entries.data_ptr(), self.ready.data_ptr()
        self._first_number = self._numbers.data_ptr()

    @property
    def pointers(self) -> TablePointers:
        """What kernels take."""
        from expertd_engine.kernels.cuda.resolve import TablePointers

        return TablePointers(
            entries=self.entries,
            slot_address=self.slot_address,
            ready=self.ready,
            landing=self.landing,
            head=self.head,
            tail=self.tail,
            seen=self.seen,
            seen_count=self.seen_count,
            progress=self.progress,
            launch=self.launch,
        )

    # ------------------------------------------------------------ boundaries

    def stage(self, words: Words) -> int:
        """Write down what the next `apply` changes. Waits until what was staged before has been applied. By what it
        returns `layers_known` knows the launch."""
        self.staged_launch = (self.staged_launch // _MOST_LAYERS + 1) % _LAUNCHES * _MOST_LAYERS
        index, value = [*words, self.layout.launch], [*words.values(), self.staged_launch]
        while len(index) > _UPDATE_WORDS:
            self._write_down(index[:_UPDATE_WORDS], value[:_UPDATE_WORDS])
            self.apply_now()
            index, value = index[_UPDATE_WORDS:], value[_UPDATE_WORDS:]
        self._write_down(index, value)
        return self.staged_launch

    def apply(self) -> None:
        """The first work of a launch: change the staged words, forget the last report. May be captured in a graph;
        whoever launches it says when it has run: `applied`."""
        apply_words(self._staged, self._staging, self._words, self.seen_count, self._taken)

    def apply_now(self) -> Mark:
        """Have the staged words applied by a launch of its own; it has ended at the mark."""
        self._device.compute.run(self.apply)
        self.applied(mark := self._device.compute.mark())
        return mark

    def applied(self, mark: Mark) -> None:
        """By then what is staged was applied, at the latest."""
        self._applied = mark

    def copy_out(self) -> None:
        """The last work of a launch: what it met, to host memory."""
        self._turn = 1 - self._turn
        self._device.compute.copy([(self._host_report[self._turn], self._report)])

    def report(self, turn: int) -> Report:
        """What was copied out in a turn, once the launch has ended."""
        return self._reports[turn]

    @property
    def turn(self) -> int:
        """Of the last `copy_out`. It stands until the one after the next."""
        return self._turn

    def layers_known(self, launch: int) -> int:
        """Layers of a launch, the last or the one before, whose routes are known; 0 once another has begun."""
        known = int(self._progress[0]) - launch
        return known if 0 < known <= self.layout.layers else 0

    def _as_report(self, host: NDArray[np.int32]) -> Report:
        rows = self.seen.numel()
        return Report(host[:rows].reshape(self.seen.shape), host[rows:])

    def _write_down(self, index: list[int], value: list[int]) -> None:
        count, before = len(index), self._num_staged
        if (self._last_taken != self._last_staged).any():
            self._applied.wait()  # or what was staged before might never arrive
        self._index[:count], self._value[:count] = array("i", index), array("i", value)  # numpy takes lists more slowly
        self._index[count:before] = self.layout.unread
        self._num_staged = count
        self._last_staged += 1

    # ------------------------------------------------------------ what the copies lane does

    def announce(self, expert: ExpertId, slot: int) -> AddressMove:
        """What says that a record is on its way into the slot, whose `ready` is 0."""
        flag = self._first_entry + 16 * (expert.layer * self.layout.experts + expert.expert) + 8
        return flag, self._first_number + 8 * (slot + 1), 8

    def complete(self, slot: int) -> AddressMove:
        """What says that the record is all there."""
        return self._first_ready + 4 * slot, self._yes, 4
