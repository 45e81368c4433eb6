"""Constraints as token masks, by llguidance: what a `Constraint` means, and one matcher for each sequence that has one.

The server has compiled every constraint before, in a process of its own (`grammar_check.py`): what crashes or takes for
ever does so there. No torch here, so that such a process costs little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from expertd_engine.errors import ModelError
from expertd_engine.messages import Constraint
from expertd_engine.request import ConstraintFailed

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MASK_LIMIT_S = 0.1
"""Processor time that one mask may take: the whole step waits for it. Usual are 2 to 200 µs."""

DIGITS_MAX = 32
"""Digits in a row that a JSON number may have; no number format holds more. Small models do not stop by themselves."""

LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
"""The library's own, but for memory: a state takes some 200 bytes. Verbose errors would show the grammar."""

_JSON_OPTIONS: JsonCompileOptions = {
    # At most one blank, or one line break indented by eight levels: a model that likes blank space must come to an end.
    "whitespace_pattern": r"(\n {0,16}| )?",
    "lenient": False,
    "coerce_one_of": False,
}


def grammar_of(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises ConstraintFailed if its text is no JSON where it must be."""
    try:
        match constraint.kind:
            case "json_object":
                return _json_grammar('{"type": "object"}')
            case "json_schema":
                return _json_grammar(constraint.text)
            case kind:
                return grammar_from(kind, constraint.text)
    except ValueError as error:
        raise ConstraintFailed(f"{constraint.kind}: {error}") from error


def _json_grammar(schema: str) -> str:
    # As overrides, because a schema may bring options of its own.
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


def match(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """A matcher at the beginning of an answer. Raises ConstraintFailed saying what is wrong with the constraint."""
    matcher = LLMatcher(tokenizer, grammar_of(constraint), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ConstraintFailed(_reason(matcher))
    return matcher


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().removesuffix("<non-verbose/>").strip()


class Digits:
    """Which tokens go on with a number, and how many digits each brings. One for each tokenizer."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self.quote: int = tokenizer.tokenize_str('"')[0]
        self._trailing = [len(text) - len(text.rstrip(b"0123456789")) for text in texts]
        self._whole = [bool(text) and digits == len(text) for text, digits in zip(texts, self._trailing, strict=True)]
        self._begins = sum(1 << token for token, text in enumerate(texts) if text[:1].isdigit())

    def run_after(self, run: int, token: int) -> int:
        """Digits at the end of the text once `token` follows a text that ends with `run` of them."""
        return run + self._trailing[token] if self._whole[token] else self._trailing[token]

    def without(self, mask: bytes) -> bytes:
        """`mask` less the tokens that begin with a digit; as it is where that leaves none."""
        kept = int.from_bytes(mask, "little") & ~self._begins
        return kept.to_bytes(len(mask), "little") if kept else mask


class Grammars:
    """The engine's tokenizer as llguidance sees it, and the thread that compiles."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raises ModelError where the tokenizer is missing or of a kind that the library cannot take apart."""
        try:
            text = tokenizer_file.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
        except (OSError, ValueError) as error:
            raise ModelError(f"answers cannot be constrained: {error}") from error
        self._digits = Digits(self._tokenizer)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._compiled: WeakValueDictionary[Constraint, _Compiled] = WeakValueDictionary()

    def constrain(self, constraint: Constraint) -> Matcher:
        """A matcher for one sequence. It is compiled while the prompt is computed, once for all live sequences with
        the same constraint; a failure shows in `allowed`."""
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = _Compiled(self._thread.submit(match, self._tokenizer, constraint))
            self._compiled[constraint] = compiled
        return Matcher(compiled, self._digits if constraint.kind in ("json_object", "json_schema") else None)


class _Compiled:
    """A constraint on its way through the compiling thread. Lives as long as a sequence wants it, and is given up with
    the last: what nobody waits for must not hold up others."""

    def __init__(self, compiling: Future[LLMatcher]) -> None:
        self._compiling = compiling

    def __del__(self) -> None:
        self._compiling.cancel()

    def new_matcher(self) -> LLMatcher:
        """At the beginning of an answer. Waits for the compilation; raises ConstraintFailed."""
        return self._compiling.result().deep_copy()


class Matcher:
    """A `Constrainer`. With `digits`, for JSON, numbers come to an end (`DIGITS_MAX`)."""

    def __init__(self, compiled: _Compiled, digits: Digits | None) -> None:
        self._compiled = compiled
        self._digits = digits
        self._run = 0

    @cached_property
    def _matcher(self) -> LLMatcher:
        return self._compiled.new_matcher()

    def allowed(self) -> bytes:
        matcher = self._matcher
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ConstraintFailed(f"the constraint cannot be kept to any longer: {_reason(matcher)}")
        spent = time.thread_time() - began
        if spent > MASK_LIMIT_S:
            raise ConstraintFailed(
                f"the constraint is too slow: {spent:.2f} s of processor time for one token, {MASK_LIMIT_S} s allowed"
            )
        if self._digits is not None and self._run >= DIGITS_MAX and not _has(mask, self._digits.quote):
            return self._digits.without(mask)  # where a quotation mark may come, the digits are a string's
        return mask

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)  # a failure stays with it
        if self._digits is not None:
            self._run = self._digits.run_after(self._run, token_id)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _has(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)
