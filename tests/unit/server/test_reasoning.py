"""Splitting thoughts from answers, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_server.reasoning import KNOWN_TAGS, ReasoningSplitter, ReasoningTags, tags_of

TAGS = ReasoningTags("<think>", "</think>")


def split(pieces: list[str], prompt: str = "assistant\n") -> tuple[str, str]:
    splitter = ReasoningSplitter(TAGS, prompt)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.end()]
    return "".join(part.reasoning for part in parts), "".join(part.answer for part in parts)


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("a\n", "<think>\nhm\n</think>\n\nyes", ("hm", "yes")),
        ("a\n", "\n<think>hm</think>yes </think>", ("hm", "yes </think>")),
        ("a\n", "plain <think>no</think>", ("", "plain <think>no</think>")),
        ("a\n", " <thin", ("", " <thin")),
        ("a\n", "<think>cut of", ("cut of", "")),
        ("a\n", "<think>cut \n</th", ("cut \n</th", "")),
        ("a<think>\n", "hm\n\nso </think> yes", ("hm\n\nso", "yes")),
        ("a<think>", "", ("", "")),
        ("a<think>\n\n</think>\n\n", "yes", ("", "yes")),
    ],
)
def test_a_thought_ends_at_its_tag(prompt: str, text: str, expected: tuple[str, str]) -> None:
    assert split([text], prompt) == expected
    assert split(list(text), prompt) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "th", "a", " ", "\n", ">"])), st.booleans())
def test_how_a_text_is_cut_does_not_matter(pieces: list[str], inside: bool) -> None:
    prompt = "x<think>" if inside else "x"
    assert split(pieces, prompt) == split(["".join(pieces)], prompt) == split(list("".join(pieces)), prompt)


def test_tags_are_those_that_the_template_speaks_of() -> None:
    assert tags_of("{{ content.split('</think>')[-1] }}") == TAGS
    assert tags_of("[THINK]{{ x }}[/THINK]") == KNOWN_TAGS[1]
    assert tags_of("{{ messages }}") is None
