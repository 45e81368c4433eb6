"""Writes one safetensors file of known layout, tensor by tensor, so that no more than a piece is ever in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 64


class TensorShape(NamedTuple):
    """What the file must know of a tensor before any byte of it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TensorFileWriter:
    """A safetensors file under way; `shapes` names all that it will hold. Tensors may come in any order, each once.

    Format: 8 bytes of header length, little-endian; JSON header; tensors back to back, without gaps
    (https://huggingface.co/docs/safetensors). Those whose length is a multiple of 64 bytes come first, which keeps each
    aligned to that, as kernels want matrices; then the others, widest dtype first, each aligned to its element.
    """

    def __init__(self, path: Path, shapes: Mapping[str, TensorShape]) -> None:
        self._shapes = dict(sorted(shapes.items(), key=lambda item: _place(*item)))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, tensor in self._shapes.items():
            self._offsets[name], end = end, end + tensor.num_bytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._begin = 8 + len(text)
        self._missing = set(self._shapes)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        os.ftruncate(self._file.fileno(), self._begin + end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"never written: {', '.join(sorted(self._missing))}")

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write tensor `name`, given as consecutive pieces in row-major order, cast to the declared dtype."""
        expected = self._shapes[name]
        self._missing.remove(name)
        self._file.seek(self._begin + self._offsets[name])
        written = 0
        for piece in pieces:
            flat = piece.detach().to(expected.dtype).contiguous().reshape(-1)
            written += self._file.write(flat.view(torch.uint8).numpy().data)
        if written != expected.num_bytes:
            raise ValueError(f"{name}: {written} bytes written, {expected.num_bytes} declared")


def _place(name: str, tensor: TensorShape) -> tuple[bool, int, str]:
    return tensor.num_bytes % _ALIGNMENT != 0, -tensor.dtype.itemsize, name
