"""Finds, checks and binds the native kernels. Addresses go in as integers; the C header says what lies behind them.

Calls release the interpreter lock, but for the shortest. `EXPERTD_KERNELS` forces an instruction set, or `off`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypeAlias

from expertd_engine.errors import ConfigError, EngineError, ResourceError

ABI_VERSION = 5
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int4s": 4}
ORDERS = {"strips": 0, "rows": 1}
"""In which a record's matrices lie; 0 where nothing is said."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "swiglu_clamped": 5}
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "neon")
VARIABLE = "EXPERTD_KERNELS"

_INVALID = 1
_FEW_ROWS = 32
"""Up to so many are copied with the interpreter lock held: that takes microseconds, and who lets go of the lock waits
for whoever takes it. A thread with reads to begin keeps it for a quarter of a millisecond."""

Address: TypeAlias = int | None


class KernelsMissing(ResourceError):
    """There are no native kernels to use; the text says why."""


class KernelError(EngineError):
    """A kernel could not run: memory, threads, or a pool used twice at once."""


class Matrix(ctypes.Structure):
    """`expertd_matrix`. Whoever makes one keeps its data and bias alive."""

    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
    ]


class ExpertLayout(ctypes.Structure):
    """`expertd_expert_layout`: where in a record an expert's tensors lie, in bytes; -1 = absent."""

    _fields_ = [
        ("hidden", c_int32),
        ("inner", c_int32),
        ("format", c_int32),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("gate", c_int64),
        ("up", c_int64),
        ("down", c_int64),
        ("gate_bias", c_int64),
        ("up_bias", c_int64),
        ("down_bias", c_int64),
        ("order", c_int32),
    ]


class ExpertsCall(ctypes.Structure):
    """`expertd_moe_call`: the arguments of `Pool.moe`, for a call that does this and more."""

    _fields_ = [
        ("layout", POINTER(ExpertLayout)),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("num_experts", c_int32),
        *((name, c_void_p) for name in ("records", "pair_begin", "pair_row", "pair_weight", "out", "partials")),
    ]


_POINTER = c_void_p
_CALLS: dict[str, list[Any]] = {
    "expertd_isa_use": [c_char_p],
    "expertd_pool_create": [c_int32, POINTER(c_void_p)],
    "expertd_pool_destroy": [_POINTER],
    "expertd_matmul": [_POINTER, POINTER(Matrix), _POINTER, c_int64, c_int64, _POINTER, c_int64],
    "expertd_rows": [POINTER(Matrix), _POINTER, c_int64, _POINTER],
    "expertd_moe": [
        *(_POINTER, POINTER(ExpertLayout), _POINTER, c_int64, c_int32, _POINTER),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    ],
}
"""Functions that return a code, with their arguments."""
_QUERIES: dict[str, tuple[list[Any], Any]] = {
    "expertd_error": ([], c_char_p),
    "expertd_abi_version": ([], c_int32),
    "expertd_isa": ([], c_char_p),
    "expertd_isa_available": ([], c_char_p),
    "expertd_matrix_bytes": ([c_int32, c_int64, c_int64], c_int64),
}


class Library:
    """The loaded kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = ctypes.CDLL(str(path))
        for name, (arguments, result) in _QUERIES.items():
            function = getattr(self.handle, name)
            function.argtypes, function.restype = arguments, result
        for name, arguments in _CALLS.items():
            self.bind(name, arguments)
        self._few_rows = self.bind(
            "expertd_rows", _CALLS["expertd_rows"], ctypes.PyDLL(None, handle=self.handle._handle)
        )

    def bind(self, name: str, arguments: list[Any], handle: ctypes.CDLL | None = None) -> Callable[..., None]:
        """The function of that name that returns a code: calling it raises ValueError for refused arguments and
        KernelError for what else went wrong. `handle`: another one on this library."""
        function = getattr(handle or self.handle, name)
        function.argtypes, function.restype, function.errcheck = arguments, c_int, self._check
        return function  # type: ignore[no-any-return]  # ctypes makes functions out of names

    @property
    def instruction_set(self) -> str:
        """The one in use."""
        return _text(self.handle.expertd_isa())

    @property
    def available(self) -> list[str]:
        """Instruction sets that this build has and this processor runs, best first."""
        return _text(self.handle.expertd_isa_available()).split()

    def use(self, instruction_set: str) -> None:
        """Force one for the whole process; "" is the best. ValueError if this processor lacks it."""
        self.handle.expertd_isa_use(instruction_set.encode())

    def matrix_bytes(self, format: str, rows: int, cols: int) -> int:
        """Bytes of a matrix as the kernels read it."""
        size: int = self.handle.expertd_matrix_bytes(FORMATS[format], rows, cols)
        if size < 0:
            raise ValueError(self.error())
        return size

    def rows(self, matrix: Matrix, ids: int, count: int, out: int) -> None:
        """float32 `[count, cols]` at `out`: the rows whose int64 ids lie at `ids`."""
        call = self._few_rows if count <= _FEW_ROWS else self.handle.expertd_rows
        call(byref(matrix), ids, count, out)

    def error(self) -> str:
        """What was wrong with this thread's last call that failed."""
        return _text(self.handle.expertd_error())

    def _check(self, code: int, function: object, arguments: object) -> None:
        if code == _INVALID:
            raise ValueError(self.error())
        if code:
            raise KernelError(f"native kernels: {self.error()}")


class Pool:
    """Compute threads, of which the caller is one, and their scratch memory. One call at a time."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self._pool = c_void_p()
        library.handle.expertd_pool_create(threads, byref(self._pool))

    @property
    def address(self) -> int | None:
        """For functions bound elsewhere; None once closed."""
        return self._pool.value

    def matmul(self, matrix: Matrix, x: int, rows: int, y: int, *, ldx: int = 0, ldy: int = 0) -> None:
        """float32 y `[rows, matrix.rows]` = x `[rows, matrix.cols]` · Wᵀ + bias. Row strides in values; 0: no gaps."""
        self.library.handle.expertd_matmul(
            self._pool, byref(matrix), x, rows, ldx or matrix.cols, y, ldy or matrix.rows
        )

    def moe(
        self,
        layout: ExpertLayout,
        x: int,
        tokens: int,
        records: Any,
        pair_begin: int,
        pair_row: int,
        pair_weight: int,
        *,
        out: Address = None,
        partials: Address = None,
    ) -> None:
        """`expertd_moe`: adds to `out`, or writes `partials`. `records`: a ctypes array of addresses, one an expert."""
        self.library.handle.expertd_moe(
            *(self._pool, byref(layout), x, tokens, len(records), records),
            *(pair_begin, pair_row, pair_weight, out, partials),
        )

    def close(self) -> None:
        """Ends the threads and frees the scratch; again is nothing."""
        if self._pool.value is not None:
            self.library.handle.expertd_pool_destroy(self._pool)
            self._pool = c_void_p()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record_addresses(addresses: list[int]) -> Any:
    """The array of pointers that `Pool.moe` takes."""
    return (c_void_p * len(addresses))(*addresses)


@cache
def load() -> Library:
    """The kernels, with the instruction set that `EXPERTD_KERNELS` names or the best.

    Raises KernelsMissing where there are none to use, ConfigError for a name that is unknown or not for this processor.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        raise KernelsMissing(f"native kernels are turned off by {VARIABLE}=off")
    if wanted and wanted not in INSTRUCTION_SETS:
        raise ConfigError(f"{VARIABLE}={wanted!r} is unknown; allowed are {', '.join(INSTRUCTION_SETS)} and off")
    library = _open(_path())
    try:
        library.use(wanted)
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {error}") from None
    return library


def why_missing() -> str | None:
    """Why there are no native kernels to use, or None if there are. ConfigError as `load`."""
    try:
        load()
    except KernelsMissing as error:
        return str(error)
    return None


def _path() -> Path:
    folder = Path(__file__).parent
    built = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").is_file()]
    if not built:
        raise KernelsMissing(
            f"native kernels were not built ({folder} has no _native{EXTENSION_SUFFIXES[0]}): "
            "install again with a C++17 compiler on the path, and pip's -v says what it met"
        )
    return built[0]


def _open(path: Path) -> Library:
    try:
        library = Library(path)
    except (OSError, AttributeError) as error:  # of another system, damaged, or older than this file
        raise KernelsMissing(f"native kernels cannot be loaded: {error}; install again") from None
    version = library.handle.expertd_abi_version()
    if version != ABI_VERSION:
        raise KernelsMissing(f"native kernels {path} have interface {version}, not {ABI_VERSION}: install again")
    return library


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
