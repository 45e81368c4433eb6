"""Dense matrices on the device: how they lie there, and how they come out of the strips that the CPU kernels read.

Rows follow each other, columns padded with zeros to whole groups of 32, so that every row begins at a multiple of 16
bytes. 4-bit byte j of a group holds column j low and column 16 + j high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from expertd_engine.kernels.formats import GROUP_COLUMNS, QUANTISED, STRIP_ROWS, packed_bytes, strip_bytes

FORMATS = ("float32", "bfloat16", *QUANTISED)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """W `[rows, cols]` of y = W x + bias, P = `cols` rounded up to a multiple of 32."""

    format: str
    data: Tensor
    """`[rows, P]` float32, bfloat16 or int8; in 4 bits uint8 `[rows, P / 2]`."""
    scales: Tensor | None
    """float16 `[rows, P / 32]` of a quantised matrix."""
    minima: Tensor | None
    """Likewise, of int4."""
    bias: Tensor | None
    """float32 `[rows]`."""
    rows: int
    cols: int

    @property
    def padded(self) -> int:
        """Columns as stored."""
        return _round_up(self.cols)

    @property
    def nbytes(self) -> int:
        """Device bytes of all parts."""
        parts = (self.data, self.scales, self.minima, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @classmethod
    def of(
        cls, format: str, data: Tensor, rows: int, cols: int, bias: Tensor | None, device: torch.device | str
    ) -> DeviceMatrix:
        """From a matrix as the CPU has it: `[rows, cols]` floats, or flat uint8 strips where `format` is quantised.

        Raises ValueError for an unknown format or a length that is not the matrix'.
        """
        shift = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        if format in QUANTISED:
            return cls(format, *to_rows(format, data.detach().to(device), rows, cols), shift, rows, cols)
        if format not in _DTYPES:
            raise ValueError(f"format {format!r} is unknown: allowed are {', '.join(FORMATS)}")
        values = data.detach().to(device, _DTYPES[format])
        if tuple(values.shape) != (rows, cols):
            raise ValueError(f"a matrix of {rows} x {cols} has data of {' x '.join(map(str, values.shape))}")
        return cls(format, pad(values, (0, -cols % GROUP_COLUMNS)).contiguous(), None, None, shift, rows, cols)

    @classmethod
    def concat(cls, parts: Sequence[DeviceMatrix]) -> DeviceMatrix:
        """The rows of all, in order: one product reads them all. ValueError if their formats or columns differ."""
        first = parts[0]
        kinds = {(part.format, part.cols) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"matrices of different kinds cannot be one: {', '.join(map(str, sorted(kinds)))}")
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat([part._bias_or_zeros() for part in parts])
        return cls(
            *(first.format, torch.cat([part.data for part in parts])),
            *(_cat([part.scales for part in parts]), _cat([part.minima for part in parts]), bias),
            *(sum(part.rows for part in parts), first.cols),
        )

    def _bias_or_zeros(self) -> Tensor:
        return torch.zeros(self.rows, device=self.data.device) if self.bias is None else self.bias


def to_rows(format: str, strips: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Data, scales and minima, row after row, of a quantised matrix in strips (`kernels.formats`), on its device.

    Raises ValueError for a length that is not the matrix'.
    """
    expected = packed_bytes(format, rows, cols)
    if strips.numel() != expected:
        raise ValueError(f"{format} [{rows}, {cols}] has {expected} bytes, not {strips.numel()}")
    whole = strips.view(-1, strip_bytes(format, cols))
    groups = _round_up(cols) // GROUP_COLUMNS
    quads = 8 if format == "int8" else 4
    end = groups * quads * 4 * STRIP_ROWS
    data = whole[:, :end].reshape(-1, groups, quads, STRIP_ROWS, 4).permute(0, 3, 1, 2, 4).reshape(len(whole) * 16, -1)
    if format == "int8":
        data = (data ^ 128).view(torch.int8)  # q + 128 to q
    halves = [_halves(whole, end, groups, rows)]
    if format == "int4":
        halves.append(_halves(whole, end + groups * 2 * STRIP_ROWS, groups, rows))
    return data[:rows].contiguous(), halves[0], halves[1] if len(halves) == 2 else None


def _halves(strips: Tensor, begin: int, groups: int, rows: int) -> Tensor:
    """float16 `[rows, groups]` that lie at `begin` of each strip as `[group][row]`."""
    stored = strips[:, begin : begin + groups * 2 * STRIP_ROWS].contiguous().view(torch.float16)
    return stored.view(-1, groups, STRIP_ROWS).transpose(1, 2).reshape(-1, groups)[:rows].contiguous()


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _round_up(cols: int) -> int:
    return -(-cols // GROUP_COLUMNS) * GROUP_COLUMNS
