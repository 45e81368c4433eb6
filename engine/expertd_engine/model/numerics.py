"""What makes float32 on the CPU give a token the same bits in any batch, where the libraries alone do not.

bfloat16 needs nothing. In float32, matrix products want rows in multiples of four (`moe.ROW_MULTIPLE`), and
elementwise functions are cut by the library into one share per thread whose last, partial vector goes through scalar
code with other bits: so they are applied to pieces small enough that the library does not cut them.
"""

from __future__ import annotations

import torch

PIECE_ELEMENTS = 32_768
"""The library's grain size for elementwise CPU kernels: what is not larger runs on one thread, uncut."""


class InvariantActivation(torch.nn.Module):
    """`act` on `[..., width]`, a few rows at a time. Bit-invariant when width is a multiple of the vector length."""

    def __init__(self, act: torch.nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= PIECE_ELEMENTS:
            return self._whole(x.contiguous())
        rows = x.reshape(-1, x.shape[-1])
        pieces = rows.split(max(1, PIECE_ELEMENTS // rows.shape[1]))
        return torch.cat([self._whole(piece.contiguous()) for piece in pieces]).view(x.shape)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        result = self.act(x)
        assert isinstance(result, torch.Tensor)
        return result


def make_invariant(model: torch.nn.Module) -> None:
    """Wrap every activation (`act_fn`, transformers' name for it) of a float32 model, in place."""
    for module in list(model.modules()):
        act = getattr(module, "act_fn", None)
        if isinstance(act, torch.nn.Module) and not isinstance(act, InvariantActivation):
            module.act_fn = InvariantActivation(act)
