"""Prompts to token ids: the four forms a completion prompt may take, and the model's own tokenizer.

The tokenizer belongs to the store. Text is encoded on a worker thread (`encode_batch_fast` releases the interpreter
lock), and only after a bound on its characters, so that no prompt can hold up the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from expertd_engine.errors import StoreError
from expertd_server.detokenize import Decode
from expertd_server.errors import ContextLengthExceeded, InvalidRequest, clip
from expertd_server.token_bytes import TokenBytes

MAX_PROMPTS = 1024

_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt: its ids, and its text as an echo shows it."""

    token_ids: list[int]
    text: str


def parse(prompt: object) -> list[str] | list[list[int]]:
    """The prompts of a request, all text or all ids, none empty. Raises InvalidRequest naming the item at fault."""
    if isinstance(prompt, str):
        return _texts([prompt])
    if not isinstance(prompt, list):
        raise _bad(f"prompt: got {clip(repr(prompt))}; allowed is {_FORMS}")
    if not prompt:
        raise _bad(f"prompt: the list is empty; allowed is {_FORMS}")
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise _bad(f"prompt: {len(prompt)} prompts in one request; at most {MAX_PROMPTS} are allowed")
    if kinds == {str}:
        return _texts(prompt)
    if kinds == {list}:
        return [_ids(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
    odd = next(item for item in prompt if type(item) is not type(prompt[0]) or type(item) not in (int, str, list))
    raise _bad(f"prompt: {clip(repr(odd))} does not fit in the list; allowed is {_FORMS}")


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="prompt")


def _texts(texts: list[str]) -> list[str]:
    if not all(texts):
        raise _bad("prompt: an empty string; send at least one character")
    return texts


def _ids(ids: list[Any], name: str) -> list[int]:
    if not ids:
        raise _bad(f"{name}: the list is empty; send at least one token id")
    if {type(item) for item in ids} != {int}:
        odd = next(item for item in ids if type(item) is not int)
        raise _bad(f"{name}: {clip(repr(odd))} is not a token id; ids are integers")
    return ids


class TextCodec:
    """Text ⇄ ids of the served model. Thread-safe: the tokenizer is never changed after loading."""

    def __init__(self, tokenizer: Tokenizer, model_name: str, settings: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.model_name = model_name
        self.settings = settings or {}
        """What the checkpoint's tokenizer_config.json says, and its chat template."""
        self.token_bytes = TokenBytes(tokenizer)
        self._longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, store: Path) -> TextCodec:
        """From a store's files. Raises StoreError when they are missing or unreadable."""
        try:
            index = msgspec.json.decode((store / "store.json").read_bytes(), type=dict[str, Any])
            text = (store / "tokenizer.json").read_text(encoding="utf-8")
            settings = _read_settings(store)
        except (OSError, ValueError) as error:
            raise StoreError(f"store {store} cannot be read: {error}") from error
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises that class itself
            raise StoreError(f"store {store}: tokenizer.json is not a tokenizer: {error}") from error
        return cls(tokenizer, str(index.get("name") or store.name), settings)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def decoder_showing(self, shown: Set[str]) -> Decode:
        """Like `decode`, but writing out those of the special tokens."""
        special = {i: str(t.content) for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        if shown.isdisjoint(special.values()):
            return self.decode
        hidden = frozenset(i for i, text in special.items() if text not in shown)
        return lambda ids: self.decode_all([i for i in ids if i not in hidden])

    def token_text(self, token_id: int) -> str:
        """One token alone, special tokens shown: for logprobs."""
        return self.decode_all([token_id])

    @property
    def max_token_chars(self) -> int:
        """No token stands for more characters than this."""
        return self._longest_token

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary has it; empty for an id without one (vocabularies are padded)."""
        return self._tokenizer.id_to_token(token_id) or ""

    def ids_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of one text, of any length: for worker threads."""
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def ids_of_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences that spell each of `words`, at the beginning of a text and after a space."""
        spelt = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
        encoded = self._tokenizer.encode_batch_fast(spelt, add_special_tokens=False)
        return [list(ids) for ids in dict.fromkeys(tuple(item.ids) for item in encoded) if ids]

    async def encode(
        self,
        prompts: list[str] | list[list[int]],
        vocab_size: int,
        window: int,
        *,
        add_special_tokens: bool = True,
        keep_last: int | None = None,
    ) -> list[EncodedPrompt]:
        """Ids for all prompts, in order; of each the last `keep_last`, where given. Text gets what the tokenizer's own
        post-processor adds (such as BOS); ids are taken as they are. Raises InvalidRequest for ids outside the
        vocabulary, ContextLengthExceeded for text that cannot fit `window` tokens."""
        kept = [p[-keep_last:] if keep_last and isinstance(p, list) else p for p in prompts]
        for prompt in kept:
            self._check(prompt, vocab_size, window)
        return await asyncio.to_thread(
            lambda: [self._encode_one(prompt, add_special_tokens, keep_last) for prompt in kept]
        )

    def _check(self, prompt: str | list[int], vocab_size: int, window: int) -> None:
        if isinstance(prompt, str):
            if len(prompt) > window * self._longest_token:
                raise ContextLengthExceeded(len(prompt) // self._longest_token, window, at_least=True)
        elif len(prompt) > window:
            raise ContextLengthExceeded(len(prompt), window)
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            odd = next(item for item in prompt if not 0 <= item < vocab_size)
            raise _bad(f"prompt: token id {clip(odd)} is not in the vocabulary; allowed are 0 to {vocab_size - 1}")

    def _encode_one(self, prompt: str | list[int], add_special_tokens: bool, keep_last: int | None) -> EncodedPrompt:
        if isinstance(prompt, list):
            return EncodedPrompt(prompt, self.decode(prompt))
        ids = self.ids_of(prompt, add_special_tokens=add_special_tokens)
        if not ids:
            raise _bad("prompt: the tokenizer makes no token of this text")
        if keep_last is not None and len(ids) > keep_last:
            return EncodedPrompt(ids[-keep_last:], self.decode(ids[-keep_last:]))
        return EncodedPrompt(ids, prompt)


def _read_settings(store: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if (store / "tokenizer_config.json").is_file():
        settings = msgspec.json.decode((store / "tokenizer_config.json").read_bytes(), type=dict[str, Any])
    if (store / "chat_template.jinja").is_file():
        settings["chat_template"] = (store / "chat_template.jinja").read_text(encoding="utf-8")
    return settings
