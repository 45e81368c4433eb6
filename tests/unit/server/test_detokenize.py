"""Text comes out once, whole and in order, however it is cut into tokens; stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from expertd_server.detokenize import MAX_WINDOW_TOKENS, Detokenizer, StopMatcher
from support.fake_store import BYTE_IDS, END, TOKENIZER, ids_of


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


def pieces(ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@given(st.text(max_size=40))
@example("é😀\ufffd日")
@example("\ufffd\ufffd\ufffd\ufffd\ufffda")
def test_pieces_of_a_text_join_to_it_and_split_no_character(text: str) -> None:
    got = pieces(ids_of(text))
    assert "".join(got) == text
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


@given(st.lists(st.sampled_from([*BYTE_IDS, END, END]), max_size=60))
def test_pieces_of_any_bytes_join_to_their_decoding(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == decode(ids)


@given(st.text(min_size=1, max_size=10), st.text(max_size=10))
def test_a_prompt_before_it_changes_nothing_of_the_text(prompt: str, text: str) -> None:
    assert "".join(pieces(ids_of(text), ids_of(prompt))) == text


def test_a_character_begun_in_the_prompt_belongs_to_the_answer() -> None:
    ids = ids_of("a😀b")
    assert "".join(pieces(ids[3:], ids[:3])) == "😀b"


def test_plain_text_is_not_delayed() -> None:
    assert pieces(ids_of("abc")) == ["a", "b", "c", ""]


def test_noise_does_not_pile_up() -> None:
    lengths = []

    def measured(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    detokenizer = Detokenizer(measured)
    text = "".join([*(detokenizer.add(BYTE_IDS[0x80]) for _ in range(2000)), detokenizer.flush()])
    assert set(text) == {"\ufffd"}
    assert max(lengths) <= 2 * MAX_WINDOW_TOKENS


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """Like a sentencepiece vocabulary: its decoder drops the space in front of the first token."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁is": 0, "▁Paris": 1, "</s>": 2, ",": 3}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize(
    ("ids", "text"), [([1, 3, 1], " Paris, Paris"), ([2, 1, 2, 2, 1], " Paris Paris"), ([1, 2, 1], " Paris Paris")]
)
def test_the_space_in_front_of_a_word_is_kept(metaspace: Tokenizer, ids: list[int], text: str) -> None:
    detokenizer = Detokenizer(lambda i: str(metaspace.decode(i, skip_special_tokens=True)), [0])
    assert "".join([*(detokenizer.add(i) for i in ids), detokenizer.flush()]) == text


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character: the first time a stop string is complete, the text before the longest one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


WORDS = st.text("ab\u00e9", min_size=1, max_size=4)


@given(st.lists(st.text("ab\u00e9", max_size=4), max_size=12), st.lists(WORDS, max_size=4))
@example(["a", "ab"], ["aab"])
@example(["ab"], ["b", "ab"])
def test_the_text_before_a_stop_is_that_of_a_search_of_the_whole(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = [matcher.feed(part) for part in parts]
    out.append(matcher.flush())
    assert ("".join(out), matcher.matched) == naive("".join(parts), stops)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(WORDS, max_size=4))
def test_what_was_given_out_is_never_part_of_a_stop(parts: list[str], stops: list[str]) -> None:
    """At every moment, whatever may still follow."""
    matcher, given_out, seen = StopMatcher(stops), "", ""
    for part in parts:
        given_out, seen = given_out + matcher.feed(part), seen + part
        for stop in stops:
            for size in range(1, len(stop)):
                if matcher.matched is None and seen.endswith(stop[:size]):
                    assert len(given_out) <= len(seen) - size
