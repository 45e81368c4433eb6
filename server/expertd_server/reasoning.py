"""Splitting what a model thinks from what it answers, as the text comes in. Pure.

Templates of such models name the tags. A prompt that ends in the opening tag has the model begin inside; otherwise it
may open the thought itself, at the very beginning of its text and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

from expertd_server.detokenize import StopMatcher


class ReasoningTags(NamedTuple):
    opening: str
    closing: str


KNOWN_TAGS = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<seed:think>", "</seed:think>"),
)


def tags_of(template: str) -> ReasoningTags | None:
    """The tags that a chat template speaks of."""
    return next((tags for tags in KNOWN_TAGS if tags.closing in template), None)


class Split(NamedTuple):
    """What a piece of text added to the thought and to the answer."""

    reasoning: str
    answer: str


class ReasoningSplitter:
    """One answer's text, split as it comes. White space around the thought and before the answer is dropped."""

    def __init__(self, tags: ReasoningTags, prompt: str) -> None:
        self._tags = tags
        self._state = "thought" if prompt.rstrip().endswith(tags.opening) else "beginning"
        self._closing = StopMatcher([tags.closing])
        self._held = ""
        self._told = False
        """Whether anything but white space was given out in the present state."""

    def feed(self, text: str) -> Split:
        """Take the next piece of text."""
        if self._state == "beginning":
            self._held += text
            return self._begin()
        if self._state == "thought":
            return self._think(text)
        return Split("", self._trimmed(text) if self._state == "answer" else text)

    def end(self) -> Split:
        """What was held back, now that nothing follows."""
        if self._state == "beginning":
            return Split("", self._held)
        return Split(self._visible(self._closing.flush()) if self._state == "thought" else "", "")

    def _begin(self) -> Split:
        start = self._held.lstrip()
        opening = self._tags.opening
        if len(start) < len(opening) and opening.startswith(start):
            return Split("", "")
        held, self._held = self._held, ""
        if start.startswith(opening):
            self._state = "thought"
            return self._think(start[len(opening) :])
        self._state = "plain"
        return Split("", held)

    def _think(self, text: str) -> Split:
        thought = self._visible(self._closing.feed(text))
        if self._closing.matched is None:
            return Split(thought, "")
        self._held = ""
        self._state, self._told = "answer", False
        return Split(thought, self._trimmed(self._closing.rest))

    def _visible(self, text: str) -> str:
        """`text` without white space at the thought's beginning; what may be its end's is held back."""
        text = self._held + text
        if not self._told:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._told = self._told or bool(shown)
        return shown

    def _trimmed(self, text: str) -> str:
        if not self._told:
            text = text.lstrip()
            self._told = bool(text)
        return text
