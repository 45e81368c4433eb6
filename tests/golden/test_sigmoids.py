"""Sigmoids that models compute by themselves give a number the same bits wherever it stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertd_engine.model.numerics import PIECE_ELEMENTS, InvariantSigmoids

SPELLINGS: list[Callable[[Tensor], Tensor]] = [torch.sigmoid, torch.nn.functional.sigmoid, Tensor.sigmoid]


@pytest.mark.parametrize("sigmoid", SPELLINGS)
@pytest.mark.parametrize("rows", [1, 3, 20, 41])
def test_rows_of_one_number_do_not_depend_on_how_many_there_are(sigmoid: Callable[[Tensor], Tensor], rows: int) -> None:
    x = torch.randn(4100, 1, generator=torch.Generator().manual_seed(0))
    with InvariantSigmoids():
        whole = sigmoid(x)
        assert torch.equal(torch.cat([sigmoid(part) for part in x.split(rows)]), whole)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole, torch.sigmoid(x))


def test_more_than_one_piece() -> None:
    x = torch.randn(257, 131, generator=torch.Generator().manual_seed(1))
    assert x.numel() > PIECE_ELEMENTS
    with InvariantSigmoids():
        assert torch.equal(torch.sigmoid(x)[100], torch.sigmoid(x[100]))


def test_other_precisions_and_functions_are_left_alone() -> None:
    x = torch.randn(33, generator=torch.Generator().manual_seed(2))
    with InvariantSigmoids():
        assert torch.equal(torch.tanh(x), x.tanh())
        assert torch.sigmoid(x.bfloat16()).dtype == torch.bfloat16
        assert torch.sigmoid(x.double()).dtype == torch.float64
