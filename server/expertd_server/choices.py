"""From a request to sequences for the engine, and from the engine's tokens back to the text of each choice.

`plan_sequences` checks what depends on the model and says what the engine is to compute. A `Choice` owns the text,
logprobs and ending of one answer; it is told of tokens and asks nothing of anybody.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from expertd_engine.messages import EngineInfo, Finished, Output, Sampling, TokenLogprob
from expertd_server.detokenize import Detokenizer, StopMatcher
from expertd_server.engine_client import Update
from expertd_server.errors import ContextLengthExceeded, Draining, EngineFault, InvalidRequest
from expertd_server.prompts import EncodedPrompt, TextCodec
from expertd_server.schemas import CompletionRequest

NO_LOGPROB = -9999.0
"""JSON has no minus infinity; this is what clients expect in its place."""


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """One sequence to submit. Its place in the list is the index of its choice: prompt i, sample j is i × n + j."""

    prompt: EncodedPrompt
    sampling: Sampling
    choice_index: int


def plan_sequences(
    request: CompletionRequest, prompts: Iterable[EncodedPrompt], info: EngineInfo
) -> list[PlannedSequence]:
    """All sequences of a request. Raises InvalidRequest for ids outside the vocabulary or a prompt that leaves no
    room; an answer that would not fit is shortened to what is left of the window."""
    _check_vocabulary("logit_bias", map(int, request.logit_bias), info)
    _check_vocabulary("stop_token_ids", request.stop_token_ids, info)
    seed = request.seed if request.seed is not None else secrets.randbits(63)
    planned = []
    for prompt in prompts:
        sampling = _sampling(request, seed, _answer_tokens(request, prompt, info))
        planned += [PlannedSequence(prompt, sampling, j) for j in range(request.n)]
    return planned


def _check_vocabulary(param: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token_id in ids:
        if token_id >= info.vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary; allowed are 0 to {info.vocab_size - 1}",
                param=param,
            )


def _answer_tokens(request: CompletionRequest, prompt: EncodedPrompt, info: EngineInfo) -> int:
    left = info.max_model_len - len(prompt.token_ids)
    if left < min(1, request.max_tokens):
        raise ContextLengthExceeded(len(prompt.token_ids), info.max_model_len)
    return min(request.max_tokens, left)


def _sampling(request: CompletionRequest, seed: int, max_tokens: int) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens, max_tokens),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias={int(token_id): bias for token_id, bias in request.logit_bias.items()},
        seed=seed,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )


@dataclass(slots=True)
class LoggedToken:
    """A token of the answer (or of an echoed prompt) with its logprobs. `offset` counts characters of the text."""

    text: str
    offset: int
    logprob: float | None = None
    top: list[tuple[str, float]] | None = None


@dataclass(slots=True)
class Delta:
    """What one update added to a choice."""

    index: int
    text: str = ""
    tokens: list[LoggedToken] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.tokens or self.finish_reason)


class Choice:
    """One answer in the making. `finished` says that its text is complete, which a stop string can bring about before
    the engine knows."""

    def __init__(self, index: int, prompt: EncodedPrompt, request: CompletionRequest, codec: TextCodec) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finished = False
        self._prompt = prompt
        self._request = request
        self._codec = codec
        self._detokenizer = Detokenizer(codec.decode, prompt.token_ids)
        self._stops = StopMatcher(request.stops)
        self._echo = prompt.text if request.echo else ""
        self._chars = len(self._echo)

    def apply(self, update: Update) -> Delta:
        """Take what the engine sent. Raises EngineFault or Draining where the engine gave the sequence up."""
        delta = Delta(self.index, text=self._echo)
        self._echo = ""
        if update.output is not None:
            if update.output.prompt_logprobs is not None:
                delta.tokens += self._logged_prompt(update.output.prompt_logprobs)
            self._add_tokens(delta, update.output, update.finished)
        if update.finished is not None and not self.finished:
            self._end(delta, update.finished)
        return delta

    def _add_tokens(self, delta: Delta, output: Output, finished: Finished | None) -> None:
        stop_token_id = finished.stop_token_id if finished is not None else None
        logprobs: Sequence[TokenLogprob | None] = output.logprobs or [None] * len(output.token_ids)
        for token_id, logprob in zip(output.token_ids, logprobs, strict=True):
            if self.finished:  # the rest was computed after the token that completed a stop string
                return
            self.completion_tokens += 1
            if logprob is not None:
                delta.tokens.append(self._logged(logprob, self._chars))
            # The token that ends an answer counts, but is not part of its text.
            self._add_text(delta, "" if token_id == stop_token_id else self._detokenizer.add(token_id))

    def _add_text(self, delta: Delta, piece: str) -> None:
        self._chars += len(piece)
        if self.completion_tokens < self._request.min_tokens:
            delta.text += piece
            return
        delta.text += self._stops.feed(piece)
        if self._stops.matched is not None:
            self.finished = True
            delta.finish_reason, delta.stop_reason = "stop", self._stops.matched

    def _end(self, delta: Delta, finished: Finished) -> None:
        if finished.reason == "error":
            raise EngineFault(finished.error or "the engine could not finish this sequence")
        if finished.reason == "abort":  # not asked for by this request: the engine is being shut down
            raise Draining
        self._add_text(delta, self._detokenizer.flush())
        if self.finished:
            return
        self.finished = True
        delta.text += self._stops.flush()
        delta.finish_reason = finished.reason
        if finished.stop_token_id in self._request.stop_token_ids:
            delta.stop_reason = finished.stop_token_id

    def _logged(self, logprob: TokenLogprob, offset: int) -> LoggedToken:
        top = [(self._codec.token_text(t.token_id), _finite(t.logprob)) for t in logprob.top]
        return LoggedToken(self._codec.token_text(logprob.token_id), offset, _finite(logprob.logprob), top)

    def _logged_prompt(self, logprobs: list[TokenLogprob | None]) -> list[LoggedToken]:
        """One entry for each token of the prompt, the first without numbers."""
        offset, detokenizer, logged = 0, Detokenizer(self._codec.decode), []
        for token_id, logprob in zip(self._prompt.token_ids, logprobs, strict=True):
            if logprob is None:
                logged.append(LoggedToken(self._codec.token_text(token_id), offset))
            else:
                logged.append(self._logged(logprob, offset))
            offset = min(offset + len(detokenizer.add(token_id)), len(self._prompt.text))
        return logged


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NO_LOGPROB
