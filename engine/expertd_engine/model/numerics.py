"""What makes a token's activations the same bits in any batch on the CPU, where the libraries alone do not.

Matrix products want rows in multiples of four (`ROW_MULTIPLE`).
Elementwise functions are cut by the library into one share per thread, and the last, partial vector of a share goes
through scalar code with other bits: so activations are applied to pieces that are whole vectors and are never cut.
Of the functions that families call by themselves, outside an activation, the sigmoid in float32 is such a one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

ROW_MULTIPLE = 4
"""Matrix products give other bits for fewer rows than four and, in float32, for the last `rows mod 4`; in bfloat16 only
now and then (one number in ten thousand at 576 × 1536, in a batch of one). So rows are padded to a multiple of four."""
PIECE_ELEMENTS = 32_768
"""The library's grain size for elementwise CPU kernels: what is not larger runs on one thread, uncut."""
VECTOR_ELEMENTS = 64
"""A multiple of what any CPU kernel takes at once: two vectors of 512 bits, of 2 bytes an element."""
_SAME_BITS_IN_BF16 = ("SiLU", "SiLUActivation", "ReLU")
"""Classes, torch's and transformers', whose scalar and vector code agree on every bfloat16 number; GELU's do not."""

_SIGMOIDS = frozenset({torch.sigmoid, torch.Tensor.sigmoid})


class InvariantActivation(torch.nn.Module):
    """The elementwise `act` on a tensor of any shape, in pieces of at most `PIECE_ELEMENTS`."""

    def __init__(self, act: torch.nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _in_pieces(self.act, x)


class InvariantSigmoids(TorchFunctionMode):
    """While entered, every float32 sigmoid of this thread is computed in pieces.

    A mode, because routers and shared experts' gates call the function in the middle of their `forward`. It costs
    about two microseconds for each torch function called.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SIGMOIDS and not kwargs and args[0].dtype == torch.float32:
            return _in_pieces(torch.sigmoid, args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def one_thread() -> Iterator[None]:
    """While entered, the library computes on the calling thread alone. It costs 0.2 µs.

    For rows that are soon done: its other threads sleep, and until they are awake and have the core that native code's
    threads wait on, a row of 49,152 logits has taken a millisecond instead of a sixth. Sums are in one order then,
    however many threads the engine has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_invariant(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Wrap the activations (`act_fn`, transformers' name for it) of a model of that dtype in place, where needed."""
    for module in list(model.modules()):
        act = getattr(module, "act_fn", None)
        if not isinstance(act, torch.nn.Module) or isinstance(act, InvariantActivation):
            continue
        if dtype == torch.float32 or type(act).__name__ not in _SAME_BITS_IN_BF16:
            module.act_fn = InvariantActivation(act)


def _in_pieces(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    whole = pad(flat, (0, -len(flat) % VECTOR_ELEMENTS))
    results = [function(piece) for piece in whole.split(PIECE_ELEMENTS)]
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result[: len(flat)].view(x.shape)
