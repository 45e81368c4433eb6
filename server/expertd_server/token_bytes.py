"""Which bytes a token stands for: they need not be whole characters, so its text cannot tell. Pure."""

from __future__ import annotations

import re
from itertools import count

from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(token.content) for i, token in tokenizer.get_added_tokens_decoder().items()}
        by_level = tokenizer.decoder is not None and b'"ByteLevel"' in tokenizer.decoder.__getstate__()
        self._alphabet = _byte_alphabet() if by_level else {}

    def of(self, token_id: int) -> bytes | None:
        """None where the tokenizer does not say."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = str(self._tokenizer.id_to_token(token_id) or "")
        if self._alphabet and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        single = _FALLBACK.fullmatch(piece)
        if single is not None:
            return bytes.fromhex(single[1])
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        return None if "\N{REPLACEMENT CHARACTER}" in text else text.encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: printable Latin-1 stands for itself, the others
    come after it (as in GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
