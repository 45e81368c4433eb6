"""What a work folder was made of: fingerprints by name, of contents alone, and the refusal to go on with anything else.

Owns `origin.json`, which tells it of all that was trained and scored there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor

from expertd_engine.errors import ModelError
from expertd_engine.publish import exclusive

Origin: TypeAlias = Mapping[str, str]
"""Name of a source, as a message calls it → its fingerprint or setting."""

_ORIGIN = "origin.json"
_SAMPLED = 4096
"""Elements of a tensor, evenly spread: training changes them all, and those of a large model are read at once."""


def settle(folder: Path, origin: Origin, made: Iterable[str]) -> None:
    """Note `origin` in a folder where nothing matches `made` yet. Raises ModelError for one begun otherwise."""
    path = folder / _ORIGIN
    with exclusive(path):
        if any(True for pattern in made for _ in folder.glob(pattern)):
            check_origin(folder, json.loads(path.read_text()) if path.is_file() else {}, origin)
        else:
            _replace(path, json.dumps(dict(origin)))


def check_origin(folder: Path, found: Origin, asked: Origin) -> None:
    """Raise ModelError, naming what differs, unless `folder`, made of `found`, was made of what is `asked`."""
    differs = {
        "changed": [name for name in found if name in asked and found[name] != asked[name]],
        "missing now": [name for name in found if name not in asked],
        "new": [name for name in asked if name not in found],
    }
    if not any(differs.values()):
        return
    named = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differs.items() if names)
    told = f"was made of something else ({named})" if found else "does not tell what it was made of"
    raise ModelError(f"{folder} {told}: name another --work folder, or remove this one")


def texts_of(domain: str) -> str:
    """The name of a domain's texts in an origin."""
    return f"texts of {domain}"


def files_fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Of the files' contents and of their places below `root`, which say what is held out; read piece by piece."""
    digest = _digest()
    for path in paths:
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, _digest).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{contents}\0".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer, end_of_text: int) -> str:
    """Of all that it says in its file, and of the token that ends a text."""
    return _digest(f"{end_of_text} {tokenizer.to_str()}".encode()).hexdigest()


def weights_fingerprint(settings: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a model's `settings` and of its weights' names, types, shapes and some elements of each: an edit of a few
    weights alone may go unseen, another training does not."""
    digest = _digest(settings.encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: flat.numel() // _SAMPLED | 1].contiguous().cpu()  # an odd stride: of all columns
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)
