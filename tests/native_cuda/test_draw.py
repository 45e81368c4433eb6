"""Tokens drawn on the device: by the same numbers as on the processor, and never what cannot come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd_engine.kernels.cuda.draw import Drawing
from expertd_engine.messages import Sampling
from expertd_engine.model.sampler import Draw, SampleRow, plain_draw, sample, takes_the_best
from golden.tolerances import DEVICE_DRAW
from support.interpreter import DEVICE

TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def drawn(drawing: Drawing, logits: Tensor, draws: Sequence[Draw | None]) -> list[int]:
    """None: the row takes the best."""
    chosen = [draw or Draw(0.0, 0.0, 0) for draw in draws]
    words = torch.from_numpy(np.array([draw.word for draw in chosen], np.uint32).view(np.int32))
    temperatures, least = (
        torch.tensor([getattr(draw, name) for draw in chosen], device=DEVICE) for name in ("temperature", "least")
    )
    best = logits.nan_to_num(-torch.inf).argmax(-1).to(DEVICE)
    drawing(logits.to(DEVICE), best, (temperatures, least, words.to(DEVICE)))
    return best.tolist()


@pytest.mark.parametrize("width", [5, 4096, 10_000])
def test_a_token_comes_where_the_sum_of_shares_passes_the_number(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = 4 * torch.randn(1, width, generator=generator).expand(24, -1)
    words = [0, 2**32 - 1, *torch.randint(0, 2**32, (22,), generator=generator).tolist()]
    shares = (logits[0].double() / 0.7).softmax(-1)
    upto = shares.cumsum(0)
    drawing = Drawing(24, width, DEVICE)
    for token, word in zip(drawn(drawing, logits, [Draw(0.7, -LARGEST, word) for word in words]), words, strict=True):
        number = word / 2**32
        assert upto[token] - shares[token] - DEVICE_DRAW.allowed <= number <= upto[token] + DEVICE_DRAW.allowed


def test_rows_draw_alone_and_what_a_launch_leaves_does_not_matter() -> None:
    logits = torch.randn(3, 9_000, generator=torch.Generator().manual_seed(1))
    draws = [Draw(1.0, -LARGEST, 3_000_000_000), None, Draw(2.5, -LARGEST, 17)]
    drawing = Drawing(3, 9_000, DEVICE)
    first = drawn(drawing, logits, draws)
    assert first == drawn(drawing, logits, draws) and first[1] == int(logits[1].argmax())
    alone = [drawn(drawing, logits[i : i + 1], [draws[i]])[0] for i in range(3)]
    assert alone == first and first[0] != int(logits[0].argmax())


@pytest.mark.parametrize("word", [0, 2**31, 2**32 - 1])
def test_what_weighs_nothing_never_comes(word: int) -> None:
    logits = torch.full((4, 5_000), -torch.inf)
    logits[0, [7, 4_500]] = 3.0
    logits[1, [10, 20, 4_999]] = 5.0 + torch.tensor([1.0, 0.2, 0.05]).log()
    logits[2, [3, 4]] = torch.tensor([torch.nan, 1.0])
    logits[3, [100, 200]] = torch.tensor([1.0, 1.0 + 1e-6])
    draws = [Draw(1.0, -LARGEST, word), Draw(1.0, float(np.log(0.1)), word), Draw(1.0, -LARGEST, word),
             Draw(TINY, -LARGEST, word)]  # fmt: skip
    either, likely, real, best = drawn(Drawing(4, 5_000, DEVICE), logits, draws)
    assert either in (7, 4_500) and likely in (10, 20) and real == 4 and best == 200


def test_the_processor_draws_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(40, 6_000, generator=generator)
    hows = [
        SampleRow(Sampling(temperature=0.3 + seed / 20, seed=seed, min_p=0.02 * (seed % 3)), 0, [1, 2], [3] * seed, ())
        for seed in range(40)
    ]
    found = drawn(Drawing(40, 6_000, DEVICE), logits, [plain_draw(how) for how in hows])
    assert found == [sample(row, how)[0] for row, how in zip(logits, hows, strict=True)]
    assert len(set(found)) > 30


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=5), Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=1.0, logprobs=0),
        Sampling(temperature=1.0, frequency_penalty=0.5), Sampling(temperature=1.0, logit_bias={3: 1.0}),
        Sampling(temperature=0.0),
    ],
)  # fmt: skip
def test_what_takes_more_than_a_number_is_not_drawn_there(sampling: Sampling) -> None:
    how = SampleRow(sampling, 0, [1], [2], ())
    assert plain_draw(how) is None and takes_the_best(how) == (sampling.temperature == 0)
    assert plain_draw(SampleRow(Sampling(temperature=1.0), 0, [1], [2], banned=[0])) is None
