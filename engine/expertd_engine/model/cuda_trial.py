"""Whether a device gives a sequence's logits the same bits however it is cut into steps, alone and beside others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.model.cuda_model import DeviceModel, Limits, StepTokens
from expertd_engine.model.step_rows import Span

_TOKENS = 41
_CUTS = ((41,), (20, 9, 1, 1, 3, 7), (2, 39))
_BESIDE = 3


def is_invariant(model: DeviceModel, cache: DeviceCache, limits: Limits, block_tokens: int) -> bool:
    """Tries it. Keys and values go to the first blocks, whose content is lost."""
    count = min(_TOKENS, limits.model_len, limits.step_tokens - _BESIDE)
    results = [
        _logits(model, cache, _cut(cuts, count), block_tokens, beside=beside)
        for cuts in _CUTS
        for beside in ((False, True) if limits.sequences > 1 else (False,))
    ]
    return all(torch.equal(results[0], other) for other in results[1:])


def _cut(cuts: Sequence[int], count: int) -> list[int]:
    """The cuts, as far as there are tokens."""
    ends = [min(count, sum(cuts[: i + 1])) for i in range(len(cuts))]
    return [length for first, end in zip([0, *ends], ends, strict=False) if (length := end - first)]


def _logits(model: DeviceModel, cache: DeviceCache, cuts: Sequence[int], block_tokens: int, *, beside: bool) -> Tensor:
    """Of the last token of each cut's sequence so far: those that all cuts have in common is the last one."""
    blocks = -(-sum(cuts) // block_tokens)
    start, last = 0, None
    for length in cuts:
        spans = [Span(0, start, length, range(1, 1 + blocks))]
        positions = list(range(start, start + length))
        if beside:
            spans.append(Span(length, 0, _BESIDE, [1 + blocks]))
            positions += range(_BESIDE)
        ids = [(31 * position + 7) % 97 for position in positions]
        cache.begin_step(ids)
        outcome = model.step(StepTokens(ids, positions, spans, [length - 1], frozenset((0,))), cache)
        cache.end_step()
        start, last = start + length, outcome.logits[0]
    assert last is not None
    return last
