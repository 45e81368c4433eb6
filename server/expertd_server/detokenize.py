"""Token ids to text, one token at a time, and the search for stop strings in what comes out. Pure.

`Detokenizer` owns the ids of one choice whose text is not final yet; `StopMatcher` owns the text that may turn out to
be the beginning of a stop string. Neither ever takes back what it gave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PROMPT_TAIL_TOKENS = 6
"""Tokens of the prompt decoded along with the answer, so that its first token keeps the space in front of it."""
MAX_WINDOW_TOKENS = 256
"""A window this long holds no unfinished character but noise: it is given out as it is, so that cost stays bounded."""


class Detokenizer:
    """The text of a growing list of tokens.

    Decoders look at neighbours (a leading space is dropped, bytes of one character may be spread over tokens), so a
    window is decoded again with each token. It begins where the text before it is final:

        ids:    … | prefix … read | new ids …
        text:       └─ `_given` ─┘└ what `add` returns, up to the last finished character

    The concatenated pieces and `flush()` equal the text of all ids, minus the text of the prompt's tail.
    """

    def __init__(self, decode: Decode, prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_tail[-PROMPT_TAIL_TOKENS:])
        self._read = len(self._window)
        # A character that began in the prompt and ends in the answer belongs to the answer.
        self._given = decode(self._window).rstrip(REPLACEMENT) if self._window else ""

    def add(self, token_id: int) -> str:
        """The text that became final with this token, often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT) or len(self._window) > MAX_WINDOW_TOKENS:
            return self._advance(text)
        # At most the last three replacement characters stand for the bytes of one unfinished character.
        final = text[:-3] + text[-3:].rstrip(REPLACEMENT)
        if not final.startswith(self._given):
            return ""
        piece, self._given = final[len(self._given) :], final
        return piece

    def flush(self) -> str:
        """What is left when no token follows: unfinished bytes come out as replacement characters."""
        return self._advance(self._decode(self._window)) if self._window else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._given) :]
        kept = self._window[self._read :]
        kept_text = self._decode(kept)
        if kept_text:  # a window of nothing but special tokens would lose the next token's leading space
            self._window, self._given = kept, kept_text
        else:
            self._given = text
        self._read = len(self._window)
        return piece


class StopMatcher:
    """Finds the stop string whose last character comes first (the longest, if several end there).

    Text that might be the beginning of one is held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""
        self.rest = ""
        """What came after it in the same piece of text."""

    def feed(self, text: str) -> str:
        """The text that is safe to give out. After a match: what stood before it (and it, if it is to be included),
        and nothing more ever."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held, self.rest = "", buffer[end:]
            return buffer[: end if self._include else start]
        keep = self._longest_beginning(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, buffer: str) -> int:
        """Length of the longest end of `buffer` with which a stop string begins."""
        longest = min(len(buffer), max((len(stop) for stop in self._stops), default=1) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(s.startswith(buffer[-size:]) for s in self._stops)), 0
        )
