"""What the native kernels and their binding refuse, and what they say where there are none to use."""

from __future__ import annotations

import ctypes
import tomllib
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd_engine.errors import ConfigError
from expertd_engine.kernels import library
from expertd_engine.kernels.library import KernelsMissing, Matrix, Pool
from support.kernels import (
    Experts,
    Floats,
    Packed,
    Routes,
    every_format,
    make_experts,
    make_routes,
    needs_kernels,
    normal,
    pack,
    pool_on,
    run_moe,
    scratch_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engine" / "expertd_engine" / "kernels" / "native"

HIDDEN, INNER, TOKENS = 32, 32, 4
FOUR = np.array([4], np.int64)


@pytest.fixture
def pool() -> Any:
    with pool_on("") as made:
        yield made


@needs_kernels
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 5}, "format is 5; allowed are 0"),
        ({"format": -1}, "format is -1"),
        ({"rows": 0}, r"matrix\.rows is 0; allowed are 1 to"),
        ({"cols": -3}, r"matrix\.cols is -3"),
        ({"data": None}, r"matrix\.data is null"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused(pool: Pool, change: dict[str, Any], says: str) -> None:
    matrix = pack(np.ones((4, 4), np.float32), "float32").matrix()
    for name, value in change.items():
        setattr(matrix, name, value)
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match=says):
        pool.matmul(matrix, x.ctypes.data, 1, x.ctypes.data)


def _pack() -> tuple[Packed, Floats]:
    return pack(np.ones((4, 4), np.float32), "float32"), np.ones((2, 4), np.float32)


@needs_kernels
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda pool, m, x: pool.matmul(m, x, -1, x), "rows is -1"),
        (lambda pool, m, x: pool.matmul(m, x, 1, x, ldx=3), "ldx is 3, less"),
        (lambda pool, m, x: pool.matmul(m, x, 1, x, ldy=2), "ldy is 2, less"),
        (lambda pool, m, x: pool.matmul(m, 0, 1, x), "x or y is null"),
        (lambda pool, m, x: pool.library.rows(m, 0, 1, x), "ids or out is null"),
        (
            lambda pool, m, x: pool.library.rows(m, np.array([4]).ctypes.data, 1, x),
            r"ids\[0\] is 4; the matrix has 4 rows",
        ),
        (lambda pool, m, x: pool.library.rows(m, x, -1, x), "n is -1"),
        (lambda pool, m, x: pool.library.matrix_bytes("int8", 0, 1), "rows is 0"),
        (lambda pool, m, x: pool.library.use("mmx"), "'mmx' cannot be used on this processor; available: "),
        (lambda pool, m, x: Pool(pool.library, 0), "threads is 0; allowed are 1 to 1024"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    pool: Pool, call: Callable[[Pool, Matrix, int], object], says: str
) -> None:
    packed, x = _pack()
    with pytest.raises(ValueError, match=says):
        call(pool, packed.matrix(), x.ctypes.data)


def _moe_case(format: str = "float32") -> tuple[Experts, Routes, Floats]:
    rng = np.random.default_rng(0)
    experts = make_experts(rng, 3, HIDDEN, INNER, format)
    return experts, make_routes(rng, 3, TOKENS, 2), normal(rng, TOKENS, HIDDEN)


@needs_kernels
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("format", 9, "format is 9"),
        ("hidden", 0, r"layout\.hidden is 0"),
        ("inner", -1, r"layout\.inner is -1"),
        ("activation", 6, r"layout\.activation is 6; allowed are 0 to 5"),
        ("up", -1, r"layout\.up or layout\.down is absent"),
        ("down", -7, r"layout\.up or layout\.down is absent"),
        ("gate", -2, "offset of -2"),
        ("down_bias", 6, "offset of 6"),
        ("activation", 5, "clamped swiglu needs"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(pool: Pool, field: str, value: int, says: str) -> None:
    experts, routes, x = _moe_case()
    setattr(experts.layout, field, value)
    if says.startswith("clamped"):
        experts.layout.gate = -1
    with pytest.raises(ValueError, match=says):
        run_moe(pool, experts, x, routes)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "index", "value", "says"),
    [
        ("begin", 0, -1, r"pair_begin\[0\] is negative"),
        ("begin", 1, 7, "pair_begin falls after expert 1"),
        ("row", 2, TOKENS, r"pair_row\[2\] is 4; there are 4 tokens"),
        ("row", 0, -1, r"pair_row\[0\] is -1"),
    ],
)
def test_routes_that_make_no_sense_are_refused(pool: Pool, name: str, index: int, value: int, says: str) -> None:
    experts, routes, x = _moe_case()
    if name == "begin" and index == 1:
        routes.begin[2] = routes.begin[1] - 1
    else:
        getattr(routes, name)[index] = value
    with pytest.raises(ValueError, match=says):
        run_moe(pool, experts, x, routes)


@needs_kernels
def test_a_record_is_needed_where_there_are_pairs_only(pool: Pool) -> None:
    experts, routes, x = _moe_case()
    routes.begin[:] = [0, 0, *routes.begin[2:]]
    addresses = experts.addresses
    addresses[0] = None
    where = (routes.begin.ctypes.data, routes.row.ctypes.data, routes.weight.ctypes.data)
    out = np.zeros_like(x)
    pool.moe(experts.layout, x.ctypes.data, TOKENS, addresses, *where, out=out.ctypes.data)
    assert out.any()
    addresses[1] = None
    with pytest.raises(ValueError, match=r"records\[1\] is null, and it has pairs"):
        pool.moe(experts.layout, x.ctypes.data, TOKENS, addresses, *where, out=out.ctypes.data)


@needs_kernels
@every_format
def test_nothing_to_do_is_done(pool: Pool, format: str) -> None:
    """No row and no pair: neither inputs nor outputs are looked at, null or not."""
    packed = pack(np.ones((4, 4), np.float32), format)
    untouched = np.full((TOKENS, 4), 7, np.float32)
    experts, _, x = _moe_case(format)
    out = np.full_like(x, 7)
    begin = np.zeros(3 + 1, np.int32)
    for y, sums in ((0, 0), (untouched.ctypes.data, out.ctypes.data)):
        pool.matmul(packed.matrix(), 0, 0, y)
        pool.moe(experts.layout, 0, 0, experts.addresses, begin.ctypes.data, 0, 0, out=sums)
    pool.moe(experts.layout, x.ctypes.data, TOKENS, experts.addresses, begin.ctypes.data, 0, 0, out=out.ctypes.data)
    assert (untouched == 7).all() and (out == 7).all()


@needs_kernels
@every_format
def test_a_matrix_has_as_many_bytes_as_its_format_needs(format: str) -> None:
    weights = np.ones((33, 70), np.float32)
    assert library.load().matrix_bytes(format, *weights.shape) == pack(weights, format).data.size


@needs_kernels
def test_a_closed_pool_is_refused_and_closing_again_is_nothing() -> None:
    packed, x = _pack()
    pool = Pool(library.load(), 2)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="pool is null"):
        pool.matmul(packed.matrix(), x.ctypes.data, 2, x.ctypes.data)
    assert scratch_bytes(pool) == 0


@needs_kernels
def test_scratch_grows_to_the_largest_call_and_stays(pool: Pool) -> None:
    packed = pack(np.ones((16, 4096), np.float32), "int8")
    x, y = np.ones((1000, 4096), np.float32), np.empty((1000, 16), np.float32)
    sizes = []
    for rows in (1, 1000, 1, 1000):
        pool.matmul(packed.matrix(), x.ctypes.data, rows, y.ctypes.data)
        sizes.append(scratch_bytes(pool))
    assert 1000 * 4096 < sizes[1] < 2 * 1000 * 4096 and sizes[1:] == [sizes[1]] * 3


@pytest.fixture
def fresh_load() -> Any:
    """`library.load` as in a new process; afterwards the best instruction set is in use again."""
    yield library.load.__wrapped__
    if library.why_missing() is None:
        library.load().use("")


def test_off_and_unknown_names_say_so(fresh_load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "off")
    with pytest.raises(KernelsMissing, match="turned off by EXPERTD_KERNELS=off"):
        fresh_load()
    monkeypatch.setenv(library.VARIABLE, "sse9")
    with pytest.raises(ConfigError, match="EXPERTD_KERNELS='sse9' is unknown; allowed are portable, avx2"):
        fresh_load()


@needs_kernels
def test_one_can_be_forced_and_one_that_the_processor_lacks_is_refused(
    fresh_load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.VARIABLE, "portable")
    assert fresh_load().instruction_set == "portable"
    foreign = next(name for name in library.INSTRUCTION_SETS if name not in library.load().available)
    monkeypatch.setenv(library.VARIABLE, foreign)
    with pytest.raises(ConfigError, match=f"'{foreign}' cannot be used on this processor"):
        fresh_load()


def test_kernels_that_are_not_there_or_not_ours_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(KernelsMissing, match=r"were not built .*: install again with a C\+\+17 compiler"):
        library.load.__wrapped__()
    (tmp_path / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    with pytest.raises(KernelsMissing, match="cannot be loaded"):
        library.load.__wrapped__()


@needs_kernels
def test_kernels_of_another_interface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", 0)
    with pytest.raises(KernelsMissing, match=f"have interface {ours}, not 0: install again"):
        library.load.__wrapped__()


def test_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(library.Matrix) == 32 and ctypes.sizeof(library.ExpertLayout) == 80


def test_every_source_is_built_and_every_header_watched() -> None:
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    here = [path.relative_to(ROOT).as_posix() for path in sorted(NATIVE.iterdir())]
    assert extension["sources"] == [name for name in here if name.endswith(".cpp")]
    assert extension["depends"] == [name for name in here if name.endswith(".h")]
