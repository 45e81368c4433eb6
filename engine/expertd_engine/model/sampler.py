"""From logits to tokens, one row at a time, so that a row's result depends on nothing but the row.

Noise is a counter-based function of (seed, choice index, position): Philox, one uniform number a token. The same seed
gives the same text whatever else runs, after preemption, and in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy
import torch

from expertd_engine.messages import Sampling, TokenLogprob, TopLogprob

_MASK64 = 2**64 - 1
_NUCLEUS_FIRST = 256
_TINY, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""float32 has numbers smaller than the first, but not all processors divide by them."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What decides one row besides its logits. `position` is the index the new token will have in the sequence."""

    sampling: Sampling
    choice_index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    banned: Collection[int]
    """Token ids that may not come now, such as end-of-sequence before `min_tokens`."""
    allowed: bytes | None = None
    """What the constraint lets come, a bit for each token id (see `request.Constrainer`)."""
    unseen: int = 0
    """Output tokens that are not known yet."""

    @property
    def position(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.unseen


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row draws by whose logits are taken as they are, from all tokens: as `_draw`, for whoever has the logits
    elsewhere."""

    temperature: float
    least: float
    """How far a logit, divided by the temperature, may lie behind the best."""
    word: int
    """The row's uniform number in units of 2^-32, rounded down."""


class NoTokenLeft(Exception):
    """Everything the model could say next was barred, so that any choice would break a promise."""

    def __init__(self) -> None:
        super().__init__(
            "no token may come next: the answer's form, allowed_token_ids, bad_words, logit_bias and min_tokens "
            "together bar all of them"
        )


def sample(logits: torch.Tensor, row: SampleRow) -> tuple[int, TokenLogprob | None]:
    """Choose a token from `logits` `[V]` (float32). The log-probability reported is of the unmodified distribution.
    Raises NoTokenLeft."""
    adjusted = _adjust(logits, row)
    sampling = row.sampling
    token = int(adjusted.argmax()) if sampling.temperature == 0 else _draw(adjusted, row)
    if sampling.logprobs is None:
        return token, None
    return token, token_logprob(logits, token, sampling.logprobs)


def needs_no_logits(row: SampleRow) -> bool:
    """Whether whoever has the logits elsewhere may choose: `takes_the_best`, or there is a `plain_draw`."""
    sampling = row.sampling
    filters = sampling.temperature != 0 and (sampling.top_k > 0 or sampling.top_p < 1)
    return sampling.logprobs is None and not filters and _changes_nothing(row)


def takes_the_best(row: SampleRow) -> bool:
    """Whether the token with the highest logit is all that `sample` would look for."""
    return row.sampling.temperature == 0 and needs_no_logits(row)


def plain_draw(row: SampleRow) -> Draw | None:
    """How the row draws, where that takes no more than one number; None where `sample` has more to do."""
    sampling = row.sampling
    if sampling.temperature == 0 or not needs_no_logits(row):
        return None
    least = math.log(sampling.min_p) if sampling.min_p > 0 else -_LARGEST
    word = int(uniform(sampling.seed, row.choice_index, row.position) * 2.0**32)
    return Draw(max(sampling.temperature, _TINY), least, word)


def token_logprob(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of `token` under `logits` `[V]` and the `num_top` best, best first, ties by lower id."""
    logprobs = logits.log_softmax(-1)
    top: list[TopLogprob] = []
    if num_top:
        best = best_ids(logprobs, min(num_top, len(logprobs)))
        top = [TopLogprob(*pair) for pair in zip(best.tolist(), logprobs[best].tolist(), strict=True)]
    return TokenLogprob(token, float(logprobs[token]), top)


def best_ids(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of `scores` `[V]`, best first, ties by lower index (`topk` promises no order)."""
    least = scores.topk(count).values[-1]
    above = (scores > least).nonzero().flatten()
    chosen = torch.cat((above, (scores == least).nonzero().flatten()[: count - len(above)]))
    return chosen[scores[chosen].argsort(descending=True, stable=True)]


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone (Philox 4x64, Salmon et al. 2011)."""
    key = numpy.array([seed & _MASK64, choice_index], dtype=numpy.uint64)  # a list would pass through float64
    generator = numpy.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def _adjust(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Penalties, bias and bans, in the order of OpenAI's and vLLM's servers."""
    sampling = row.sampling
    if _changes_nothing(row):
        return logits
    adjusted = logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}), dtype=torch.long)
        scores = adjusted[seen]
        penalty = sampling.repetition_penalty
        adjusted[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if row.output_token_ids and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = torch.tensor(row.output_token_ids, dtype=torch.long).unique(return_counts=True)
        adjusted[ids] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.logit_bias:
        adjusted[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.allowed_token_ids is not None:
        barred = torch.ones_like(adjusted, dtype=torch.bool)
        barred[sampling.allowed_token_ids] = False
        adjusted[barred] = -torch.inf
    if row.allowed is not None:
        adjusted.masked_fill_(_bits(row.allowed, len(adjusted)).logical_not_(), -torch.inf)
    banned = [*row.banned, *_ends_of_bad_words(row)]
    if banned:
        adjusted[banned] = -torch.inf
    is_masked = bool(banned) or sampling.allowed_token_ids is not None or row.allowed is not None
    if is_masked and bool(adjusted.isneginf().all()):
        raise NoTokenLeft
    return adjusted


def _changes_nothing(row: SampleRow) -> bool:
    sampling = row.sampling
    penalties = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
    bans = row.banned or sampling.bad_words or sampling.allowed_token_ids is not None or row.allowed is not None
    return not (penalties or bans or sampling.logit_bias)


def _bits(packed: bytes, count: int) -> torch.Tensor:
    """The first `count` bits as bools `[count]`, false where there are fewer."""
    bits = numpy.unpackbits(numpy.frombuffer(packed, dtype=numpy.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.view(numpy.bool_))


def _ends_of_bad_words(row: SampleRow) -> list[int]:
    """Tokens that would complete a bad word of which all but the last token have just been generated."""
    said = row.output_token_ids
    return [
        word[-1]
        for word in row.sampling.bad_words
        if len(said) >= len(word) - 1 and list(said[len(said) - len(word) + 1 :]) == word[:-1]
    ]


def _draw(adjusted: torch.Tensor, row: SampleRow) -> int:
    """Inverse of the cumulative distribution over the candidates."""
    sampling = row.sampling
    # Relative to the best, so that a temperature near zero overflows to no more than -inf.
    scores = (adjusted - adjusted.max()) / max(sampling.temperature, _TINY)
    ids = _candidates(scores, sampling)
    cumulative = _picked(scores, ids).softmax(-1).double().cumsum(0)
    target = uniform(sampling.seed, row.choice_index, row.position) * float(cumulative[-1])
    chosen = min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)
    return chosen if ids is None else int(ids[chosen])


def _candidates(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    """Ids that top-k, min-p and top-p leave, in this order, each renormalised; None: all. The best of `scores` is 0."""
    ids = best_ids(scores, sampling.top_k) if 0 < sampling.top_k < len(scores) else None
    if sampling.min_p > 0:
        ids = _among(ids, (_picked(scores, ids) >= math.log(sampling.min_p)).nonzero().flatten())
    if sampling.top_p < 1:
        ids = _among(ids, _nucleus(_picked(scores, ids), sampling.top_p))
    return ids


def _picked(scores: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    return scores if ids is None else scores[ids]


def _among(ids: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor:
    return places if ids is None else ids[places]


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices of the best of `scores` that hold `top_p` of the mass together, best first. The best of all is 0.

    A few hundred nearly always do: the whole vocabulary is sorted only where they do not.
    """
    weights = scores.double().exp()
    total = float(weights.sum())
    count = min(_NUCLEUS_FIRST, len(scores))
    while True:
        best = best_ids(scores, count)
        mass = weights[best].cumsum(0)
        if count == len(scores) or float(mass[-1]) >= top_p * total:
            return best[mass - weights[best] < top_p * total]
        count = min(16 * count, len(scores))
