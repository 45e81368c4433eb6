"""As much of a store as the server reads: a name, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MODEL_NAME = "test/tiny"
MAX_MODEL_LEN = 64
VOCAB_SIZE = 258
END = 256
"""Id of `<|endoftext|>`."""


def make_tokenizer() -> Tokenizer:
    """Bytes as tokens, no merges, two special tokens: id i is byte i of the sorted byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer


TOKENIZER = make_tokenizer()


def _byte_ids() -> list[int]:
    """Token id of each byte: printable bytes stand for themselves in the alphabet, the others come after Latin-1."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = TOKENIZER.get_vocab()
    return [vocabulary[chr(b if b in printable else next(others))] for b in range(256)]


BYTE_IDS = _byte_ids()


def ids_of(text: str) -> list[int]:
    """Token ids of `text`, one for each byte."""
    return list(TOKENIZER.encode(text).ids)


SETTINGS = {
    "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
"""A checkpoint's tokenizer_config.json."""


def write_store(folder: Path, **settings: object) -> Path:
    """As much of a store as the server reads; `settings` go into its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.json").write_text(json.dumps({"name": MODEL_NAME}))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder
