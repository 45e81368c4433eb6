"""Who comes for whom as a step begins: native code chooses as the sets themselves do."""

from __future__ import annotations

import numpy as np
import pytest

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held_table import HeldTable
from expertd_engine.experts.swap_choice import CANDIDATES, SwapChooser, most_expected
from expertd_engine.experts.swaps import Swap, SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from support.kernels import native_pool

EXPERTS, TOP_K = [12, 12, 9, 12], 3
LIMITS = SwapLimits(per_step=0, ahead=0, foreseen=4, in_flight=6)


class Held:
    """Sets over a table, both of which know who is held and who is on the way."""

    def __init__(self, slots: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sets = VirtualExperts([[0.0] * count for count in EXPERTS], TOP_K, LIMITS)
        self.table = HeldTable(EXPERTS)
        for layer, count in enumerate(EXPERTS):
            values = rng.exponential(size=count) * (rng.random(count) < 0.7)
            self.sets.observe(layer, dict(enumerate(values.tolist())))
        for hold in self.sets.resize(slots):
            self.table.expect(hold.expert)
            self.arrive(hold.expert)

    def arrive(self, expert: ExpertId) -> None:
        self.table.granted(expert, 0)
        for hold in self.sets.arrived(expert):
            self.table.expect(hold.expert)
            self.arrive(hold.expert)

    def follow(self, swaps: list[Swap]) -> None:
        for swap in swaps:
            self.table.gone(swap.victim)
            self.table.expect(swap.newcomer)

    def bring(self, expected: np.ndarray) -> list[Swap]:
        """As without native code."""
        wanted = most_expected(expected, self.table.taken, CANDIDATES * LIMITS.foreseen)
        return self.sets.bring(wanted, lambda layer: expected[layer].tolist())


def plain(held: Held) -> bool:
    return held.sets.is_plain


def test_native_code_chooses_as_the_sets_do() -> None:
    met = 0
    with native_pool(1) as pool:
        for seed in range(40):
            rng = np.random.default_rng(seed)
            slots = [int(rng.integers(TOP_K, 8)) for _ in EXPERTS]
            plain, native = Held(slots, seed), Held(slots, seed)
            chooser = SwapChooser(pool.library, native.sets, native.table)
            for _ in range(3):  # those that the last one began are still on the way
                expected = rng.exponential(size=(len(EXPERTS), max(EXPERTS))).astype(np.float32)
                expected *= rng.random(expected.shape) < 0.6
                for layer, count in enumerate(EXPERTS):
                    expected[layer, count:] = 0
                expected = (expected / expected.sum(axis=1, keepdims=True)).astype(np.float32)
                assert native.sets.is_plain
                swaps = plain.bring(expected)
                assert native.sets.exchange(chooser(expected)) == swaps
                assert [native.sets.held(n) for n in range(4)] == [plain.sets.held(n) for n in range(4)]
                met += len(swaps)
                for one in (plain, native):
                    one.follow(swaps)
                    if swaps:
                        one.arrive(swaps[0].newcomer)
    assert met > 200


def test_sets_that_are_being_filled_or_lack_what_cannot_be_read_are_not_plain() -> None:
    held = Held([5] * 4, 0)
    assert plain(held)
    (swap, *_) = held.bring(np.where(held.table.taken, 0, np.arange(12) < 9).astype(np.float32))
    assert plain(held), "somebody comes for who has left"
    held.sets.failed(swap.newcomer)
    assert not plain(held)
    held.sets.observe(swap.newcomer.layer, {swap.newcomer.expert: 1.0})
    held.sets.resize([6] * 4)
    assert not plain(held)


def test_what_swaps_are_chosen_by_is_checked() -> None:
    with native_pool(1) as pool:
        held = Held([5] * 4, 0)
        chooser = SwapChooser(pool.library, held.sets, held.table)
        chooser._described.experts = 0
        with pytest.raises(ValueError, match="layers, experts, candidates and most are 4, 0"):
            chooser(np.zeros((4, 12), np.float32))
