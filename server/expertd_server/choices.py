"""From a request to sequences for the engine, and from the engine's tokens back to the text of each choice.

`plan_sequences` checks what depends on the model and says what the engine is to compute. A `Choice` owns the text,
logprobs and ending of one answer; it is told of tokens and asks nothing of anybody.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from expertd_engine.messages import Constraint, EngineInfo, Finished, Output, Sampling, TokenLogprob
from expertd_server.detokenize import Decode, Detokenizer, StopMatcher
from expertd_server.engine_client import Update
from expertd_server.errors import ContextLengthExceeded, Draining, EngineFault, InvalidRequest
from expertd_server.prompts import EncodedPrompt, TextCodec
from expertd_server.schemas import GenerationRequest

NO_LOGPROB = -9999.0
"""JSON has no minus infinity; this is what clients expect in its place."""


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """One sequence to submit. Its place in the list is the index of its choice: prompt i, sample j is i × n + j."""

    prompt: EncodedPrompt
    sampling: Sampling
    choice_index: int


def plan_sequences(
    request: GenerationRequest,
    prompts: Iterable[EncodedPrompt],
    info: EngineInfo,
    bad_words: list[list[int]],
    constraint: Constraint | None = None,
) -> list[PlannedSequence]:
    """All sequences of a request, whose bad words are given as token ids. Raises InvalidRequest for ids outside the
    vocabulary or a prompt that leaves no room; an answer that would not fit is shortened to what is left of the
    window."""
    _check_vocabulary("logit_bias", map(int, request.logit_bias), info)
    _check_vocabulary("stop_token_ids", request.stop_token_ids, info)
    _check_vocabulary("allowed_token_ids", request.allowed_token_ids or (), info)
    _check_some_token_is_left(request, info, bad_words)
    seed = request.seed if request.seed is not None else secrets.randbits(63)
    planned = []
    for prompt in prompts:
        sampling = _sampling(request, seed, _answer_tokens(request, prompt, info), bad_words, constraint)
        planned += [PlannedSequence(prompt, sampling, j) for j in range(request.n)]
    return planned


def _check_vocabulary(param: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token_id in ids:
        if token_id >= info.vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary; allowed are 0 to {info.vocab_size - 1}",
                param=param,
            )


def _check_some_token_is_left(request: GenerationRequest, info: EngineInfo, bad_words: list[list[int]]) -> None:
    """Wherever that can be told before anything was generated."""
    if request.allowed_token_ids is None:
        return
    barred = {word[0] for word in bad_words if len(word) == 1}
    if request.min_tokens:
        barred.update(request.stop_token_ids, () if request.ignore_eos else info.eos_token_ids)
    if barred.issuperset(request.allowed_token_ids):
        raise InvalidRequest(
            "allowed_token_ids: bad_words and min_tokens bar every one of them; allow at least one other token",
            param="allowed_token_ids",
        )


def _answer_tokens(request: GenerationRequest, prompt: EncodedPrompt, info: EngineInfo) -> int:
    """The most that the answer may have; none only where the request asks for none."""
    left = info.max_model_len - len(prompt.token_ids)
    fewest = 0 if request.answer_limit == 0 else 1
    if left < fewest:
        raise ContextLengthExceeded(len(prompt.token_ids), info.max_model_len)
    return left if request.answer_limit is None else min(request.answer_limit, left)


def _sampling(
    request: GenerationRequest, seed: int, max_tokens: int, bad_words: list[list[int]], constraint: Constraint | None
) -> Sampling:
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
        allowed_token_ids=request.allowed_token_ids,
        bad_words=bad_words,
        logprobs=request.alternatives,
        prompt_logprobs=request.alternatives if request.echoes else None,
        constraint=constraint,
    )


class Alternative(NamedTuple):
    """A token that might have been chosen."""

    token_id: int
    text: str
    logprob: float


@dataclass(slots=True)
class LoggedToken:
    """A token of the answer (or of an echoed prompt) with its logprobs. `offset` counts characters of the text."""

    token_id: int
    text: str
    offset: int
    logprob: float | None = None
    top: list[Alternative] | None = None


@dataclass(slots=True)
class Delta:
    """What one update added to a choice."""

    index: int
    text: str = ""
    tokens: list[LoggedToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Where the request asked for them, as for the prompt's, which come with the first delta of a choice."""
    prompt_token_ids: list[int] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell a client yet."""
        return not (self.text or self.tokens or self.token_ids or self.finish_reason)

    def extend(self, later: Delta) -> None:
        """Add everything but the text of `later`: pieces of text are joined once, by whoever has them all."""
        self.tokens += later.tokens
        self.token_ids += later.token_ids
        self.prompt_token_ids = self.prompt_token_ids or later.prompt_token_ids
        if later.finish_reason is not None:
            self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class Choice:
    """One answer in the making. `finished` says that its text is complete, which a stop string can bring about before
    the engine knows."""

    def __init__(
        self,
        index: int,
        prompt: EncodedPrompt,
        request: GenerationRequest,
        codec: TextCodec,
        decode: Decode | None = None,
    ) -> None:
        """`decode` stands for the codec's own, if given."""
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finished = False
        self._prompt = prompt
        self._request = request
        self._codec = codec
        self._begun = False
        decode = decode or (codec.decode if request.skip_special_tokens else codec.decode_all)
        self._detokenizer = Detokenizer(decode, prompt.token_ids)
        self._stops = StopMatcher(request.stops, include=request.include_stop_str_in_output)
        self._echo = prompt.text if request.echoes else ""
        self._chars = len(self._echo)

    def apply(self, update: Update) -> Delta:
        """Take what the engine sent. Raises InvalidRequest, EngineFault or Draining where it gave the sequence up."""
        delta = Delta(self.index, text=self._echo)
        self._echo = ""
        if self._request.return_token_ids and not self._begun:
            delta.prompt_token_ids = self._prompt.token_ids
        self._begun = True
        if update.output is not None:
            self.cached_tokens += update.output.cached_tokens
            if update.output.prompt_logprobs is not None:
                delta.tokens += self._logged_prompt(update.output.prompt_logprobs)
            self._add_tokens(delta, update.output, update.finished)
        if update.finished is not None and not self.finished:
            self._end(delta, update.finished)
        return delta

    def _add_tokens(self, delta: Delta, output: Output, finished: Finished | None) -> None:
        # The token that ends an answer counts, but is not part of its text.
        ends = finished is not None and finished.reason == "stop" and not finished.constraint_met
        hides_last = ends and not self._request.include_stop_str_in_output
        num_shown = len(output.token_ids) - hides_last
        logprobs: Sequence[TokenLogprob | None] = output.logprobs or [None] * len(output.token_ids)
        for i, (token_id, logprob) in enumerate(zip(output.token_ids, logprobs, strict=True)):
            if self.finished:  # the rest was computed after the token that completed a stop string
                return
            self.completion_tokens += 1
            if self._request.return_token_ids:
                delta.token_ids.append(token_id)
            if logprob is not None:
                delta.tokens.append(self._logged(logprob, self._chars))
            self._add_text(delta, self._detokenizer.add(token_id) if i < num_shown else "")

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
            if finished.refused and finished.error is not None:
                raise InvalidRequest(finished.error)
            raise EngineFault("the engine could not finish this sequence; the server's log says why")
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
        top = [Alternative(t.token_id, self._token_name(t.token_id), _finite(t.logprob)) for t in logprob.top]
        name = self._token_name(logprob.token_id)
        return LoggedToken(logprob.token_id, name, offset, _finite(logprob.logprob), top)

    def _token_name(self, token_id: int) -> str:
        if self._request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self._codec.token_text(token_id)

    def _logged_prompt(self, logprobs: list[TokenLogprob | None]) -> list[LoggedToken]:
        """One entry for each token of the prompt, the first without numbers."""
        offset, detokenizer, logged = 0, Detokenizer(self._codec.decode), []
        for token_id, logprob in zip(self._prompt.token_ids, logprobs, strict=True):
            if logprob is None:
                logged.append(LoggedToken(token_id, self._token_name(token_id), offset))
            else:
                logged.append(self._logged(logprob, offset))
            offset = min(offset + len(detokenizer.add(token_id)), len(self._prompt.text))
        return logged


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NO_LOGPROB
