"""Products with dense matrices on the device: right in every format and form, and a row's bits its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd_engine.kernels.cuda import dense
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm, add_norm
from expertd_engine.model.cuda_modules import DeviceMatrices
from expertd_engine.model.dense import Matrix, QuantisedEmbedding, QuantisedLinear
from expertd_engine.model.native_abi import NormKind
from golden.tolerances import DEVICE_PRODUCTS, DEVICE_PRODUCTS_BF16
from support.interpreter import DEVICE
from support.kernels import Packed, as_read, every_format, normal, pack

SHAPES = [(37, 70), (16, 64)]
"""Rows and columns: of no whole groups, and of whole ones."""


@dataclass(frozen=True)
class Case:
    packed: Packed
    matrix: DeviceMatrix
    bias: Tensor
    x: Tensor

    def product(self, form: dense.Form, x: Tensor | None = None) -> Tensor:
        """Of x as the form reads it: *rows* of a quantised matrix round it to int8."""
        given = (self.x if x is None else x).cpu().numpy()
        read = as_read(given, self.packed.format) if form == "rows" else given.astype(np.float64)
        return torch.from_numpy(read @ self.packed.values.T.astype(np.float64)) + self.bias.double()

    def error(self, out: Tensor, want: Tensor, x: Tensor | None = None) -> float:
        """The largest error over the sum of the terms' magnitudes."""
        given = self.x if x is None else x
        terms = given.double().cpu().abs() @ torch.from_numpy(self.packed.magnitudes).T + self.bias.double().abs()
        return float(((out.double().cpu() - want).abs() / terms).max())


def make(format: str, rows: int, cols: int, count: int = 5) -> Case:
    rng = np.random.default_rng(rows)
    packed = pack(normal(rng, rows, cols) / np.float32(10), format)
    bias = torch.from_numpy(normal(rng, rows))
    data = torch.from_numpy(packed.data.copy())
    if format in ("float32", "bfloat16"):
        data = data.view(getattr(torch, format)).view(rows, cols)
    matrix = DeviceMatrix.of(format, data, rows, cols, bias, DEVICE)
    return Case(packed, matrix, bias, torch.from_numpy(normal(rng, count, cols)).to(DEVICE))


def limit(format: str, form: str) -> float:
    """Tensor cores round weights and inputs to bfloat16, unless all is float32."""
    exact = format == "float32" or (format != "bfloat16" and form == "rows")
    return (DEVICE_PRODUCTS if exact else DEVICE_PRODUCTS_BF16).allowed


@every_format
@pytest.mark.parametrize("form", ["rows", "tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_right(format: str, form: dense.Form, shape: tuple[int, int]) -> None:
    case = make(format, *shape)
    out = torch.full((len(case.x), shape[0]), 7.0, device=DEVICE)
    dense.matmul(case.x, case.matrix, out, form=form)
    assert case.error(out, case.product(form)) <= limit(format, form)


def test_a_lone_input_is_not_rounded() -> None:
    case, out = make("bfloat16", 37, 70, 1), torch.empty(1, 37, device=DEVICE)
    dense.matmul(case.x, case.matrix, out)
    assert case.error(out, case.product("auto")) <= DEVICE_PRODUCTS.allowed


@every_format
@pytest.mark.parametrize("form", ["rows", "tiles"])
def test_what_is_normed_scaled_and_added(format: str, form: dense.Form) -> None:
    case = make(format, 37, 70)
    gain = torch.rand(70)
    x = (case.x.cpu() * torch.rsqrt(case.x.cpu().pow(2).mean(-1, keepdim=True) + 1e-5) * gain).float()
    norm = DeviceNorm(NormKind.RMS, gain.to(DEVICE), None, 1e-5, 70)
    out = torch.full((len(x), 37), 3.0, device=DEVICE)
    dense.matmul(case.x, case.matrix, out, norm=norm, add=True, scale=0.5, normed=torch.empty_like(case.x), form=form)
    assert case.error((out - 3.0) * 2, case.product(form, x), x) <= limit(format, form) + 2e-6  # 3 + y: its last bit


@pytest.mark.parametrize("format", ["bfloat16", "int4"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(format: str) -> None:
    case = make(format, 37, 70)
    norm = DeviceNorm(NormKind.RMS, torch.rand(70, device=DEVICE), None, 1e-5, 70)
    together = torch.empty(5, 37, device=DEVICE)
    dense.matmul(case.x, case.matrix, together, norm=norm, form="rows")
    for count in (1, 2):
        few = torch.empty(count, 37, device=DEVICE)
        dense.matmul(case.x[2 : 2 + count], case.matrix, few, norm=norm, form="rows")
        assert torch.equal(few, together[2 : 2 + count])


@every_format
def test_rows_are_looked_up(format: str) -> None:
    case = make(format, 37, 70)
    ids, out = torch.tensor([3, 0, 36, 3], device=DEVICE), torch.empty(4, 70, device=DEVICE)
    dense.embed(case.matrix, ids, 2.0, out)
    assert torch.equal(out.cpu(), 2 * torch.from_numpy(case.packed.values)[ids.cpu()])


def test_modules_over_a_quantised_matrix_read_it_on_the_device() -> None:
    packed = pack(normal(np.random.default_rng(1), 37, 70), "int4")
    matrix = Matrix(torch.from_numpy(packed.data.copy()), "int4", 37, 70)
    kernels, ids = DeviceMatrices(torch.device(DEVICE)), torch.tensor([3, 36], device=DEVICE)
    linear = QuantisedLinear(matrix, torch.nn.Parameter(torch.ones(37, device=DEVICE)), kernels)
    rows = QuantisedEmbedding(matrix, torch.float32, kernels)(ids)
    assert torch.equal(rows.cpu(), torch.from_numpy(packed.values)[ids.cpu()])
    want = 1 + rows[0].cpu() @ torch.from_numpy(packed.values).T
    torch.testing.assert_close(linear(rows[:1]).cpu()[0], want, rtol=0, atol=0.01 * float(want.abs().max()))


@pytest.mark.parametrize("format", ["float32", "int4"])
def test_matrices_side_by_side_are_one(format: str) -> None:
    parts = [make(format, rows, 70) for rows in (37, 16)]
    whole = DeviceMatrix.concat([part.matrix for part in parts])
    out = torch.empty(5, 53, device=DEVICE)
    dense.matmul(parts[0].x, whole, out, form="rows")
    alone = [torch.empty(5, part.matrix.rows, device=DEVICE) for part in parts]
    for part, one in zip(parts, alone, strict=True):
        dense.matmul(parts[0].x, part.matrix, one, form="rows")
    assert torch.equal(out, torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", [NormKind.RMS, NormKind.LAYER])
def test_the_residual_stream_takes_what_is_normed_and_gated(kind: NormKind) -> None:
    hidden, x, gate = torch.randn(3, 50), torch.randn(3, 50), torch.randn(3, 1)
    weight, bias = torch.rand(50), torch.rand(50) if kind == NormKind.LAYER else None
    gated = (x * gate.sigmoid()).double()
    if bias is not None:
        want = torch.nn.functional.layer_norm(gated, (50,), weight.double(), bias.double(), 1e-5)
    else:
        want = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    norm = DeviceNorm(kind, weight.to(DEVICE), None if bias is None else bias.to(DEVICE), 1e-5, 50)
    out = hidden.to(DEVICE, copy=True)
    add_norm(out, x.to(DEVICE), norm, 0.5, gate.to(DEVICE))
    torch.testing.assert_close(out.cpu().double(), hidden + 0.5 * want, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="format 'fp6' is unknown: allowed are float32, bfloat16, int8, int4, int4s"):
        DeviceMatrix.of("fp6", torch.zeros(2, 2), 2, 2, None, DEVICE)
    with pytest.raises(ValueError, match="a matrix of 3 x 2 has data of 2 x 2"):
        DeviceMatrix.of("float32", torch.zeros(2, 2), 3, 2, None, DEVICE)
    with pytest.raises(ValueError, match=r"int8 \[16, 32\] has 576 bytes, not 4"):
        DeviceMatrix.of("int8", torch.zeros(4, dtype=torch.uint8), 16, 32, None, DEVICE)
    case = make("float32", 16, 64)
    with pytest.raises(ValueError, match="different kinds cannot be one"):
        DeviceMatrix.concat([case.matrix, make("float32", 37, 70).matrix])
    norm = DeviceNorm(NormKind.LAYER, torch.rand(64, device=DEVICE), None, 1e-5, 64)
    with pytest.raises(ValueError, match="with a LAYER norm needs room for what is normed"):
        dense.matmul(case.x, case.matrix, torch.empty(5, 16, device=DEVICE), norm=norm, form="rows")
