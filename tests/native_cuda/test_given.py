"""What the host has written is what a launch takes over, whichever of the two ways it takes it."""

from __future__ import annotations

import pytest
import torch

from expertd_engine.kernels import given
from expertd_engine.kernels.cuda import given as kernels
from support.interpreter import DEVICE


def pinned(values: torch.Tensor) -> torch.Tensor:
    return values.pin_memory() if DEVICE == "cuda" else values


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape).int()


@pytest.mark.parametrize("count", [1, 1023, 1024, 3000])
def test_all_numbers_are_taken(count: int) -> None:
    source, target = pinned(whole(count)), torch.zeros(count, dtype=torch.int32, device=DEVICE)
    kernels.take(source, target)
    twin = torch.zeros_like(source)
    given.take(source, twin)
    assert torch.equal(target.cpu(), source) and torch.equal(twin, source)


@pytest.mark.parametrize(("used", "cleared"), [(0, 1), (1, 48), (129, 128), (256, 256)])
def test_words_change_and_counts_are_cleared(used: int, cleared: int) -> None:
    """The table's last word is the one that nobody reads."""
    before, staged = whole(1000), whole(2, 256)
    staged[0] = 999
    staged[0, :used] = torch.randperm(999)[:used]
    found = []
    for how, device in ((kernels, DEVICE), (given, "cpu")):
        words, counts = before.clone().to(device), torch.ones(cleared, dtype=torch.int32, device=device)
        turn, taken = pinned(torch.tensor([7], dtype=torch.int32)), pinned(torch.zeros(2, dtype=torch.int32))
        how.apply_words(pinned(staged), turn, words, counts, taken)
        assert not counts.any()  # which waits for the launch
        assert taken.tolist() == [7, 7]
        found.append(words.cpu())
    expected = before.clone()
    expected[staged[0, :used].long()] = staged[1, :used]
    for words in found:
        assert torch.equal(words[:999], expected[:999])


def test_more_to_clear_than_words_is_refused() -> None:
    staged, words = torch.zeros(2, 128, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="128 words beside 129"):
        kernels.apply_words(staged, words[:1], words, torch.zeros(129, dtype=torch.int32), words[:1])
