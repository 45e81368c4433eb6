"""Layers over stored matrices compute what `nn.Linear` and `nn.Embedding` do with the weights that these stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertd_engine.experts.store import ExpertStore
from expertd_engine.kernels.formats import QUANTISED, dequantise, quantise
from expertd_engine.kernels.library import VARIABLE, Pool, load, why_missing
from expertd_engine.messages import Sampling
from expertd_engine.model.dense import (
    Matrix,
    MatrixKernels,
    NativeMatrices,
    QuantisedEmbedding,
    QuantisedLinear,
    TorchMatrices,
    round_activations,
)
from expertd_engine.model.loader import read_dense
from expertd_engine.prepare import prepare
from golden.tolerances import DENSE_MATRICES, QUANTISED_DENSE_LOGITS, QUANTISED_DENSE_WORST
from support.engine import generate, running_engine
from support.tiny_checkpoints import make_checkpoint
from support.tiny_families import VOCAB_SIZE

FORMATS = ("float32", "bfloat16", *QUANTISED)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[MatrixKernels]:
    if request.param == "torch":
        yield TorchMatrices()
        return
    if why_missing():
        pytest.skip(str(why_missing()))
    with Pool(load(), 2) as pool:
        yield NativeMatrices(pool)


def _matrix(format: str, rows: int, cols: int) -> tuple[Matrix, Tensor]:
    """A random matrix in a format, and the float32 weights that it stands for."""
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    if format not in QUANTISED:
        data = weights.to(getattr(torch, format))
        return Matrix(data, format, rows, cols), data.float()
    packed = quantise(weights.numpy(), format)
    meant = torch.from_numpy(dequantise(packed, format, rows, cols))
    return Matrix(torch.from_numpy(packed), format, rows, cols), meant


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (50, 70), (2100, 33)])
def test_linear_layers_are_those_of_the_weights_meant(
    kernels: MatrixKernels, format: str, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd_engine.model.dense._BLOCK_WEIGHTS", 16 * 1024)  # so that large ones are cut
    matrix, meant = _matrix(format, rows, cols)
    bias = nn.Parameter(torch.randn(rows), requires_grad=False)
    x = torch.randn(2, 4, cols, generator=torch.Generator().manual_seed(1))
    seen = round_activations(x) if format in QUANTISED else x
    if format == "bfloat16" and isinstance(kernels, TorchMatrices):
        seen = x.bfloat16().float()
    expected = nn.functional.linear(seen.double(), meant.double(), bias.double())
    found = QuantisedLinear(matrix, bias, kernels)(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    allowed = 0.01 if format == "bfloat16" else DENSE_MATRICES.allowed  # sums of bfloat16 are rounded to it by torch
    assert float((found - expected).abs().max()) <= allowed * float(expected.abs().max())
    assert QuantisedLinear(matrix, None, kernels)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_embeddings_are_rows_of_the_weights_meant(kernels: MatrixKernels, format: str) -> None:
    matrix, meant = _matrix(format, 50, 70)
    ids = torch.tensor([[0, 49, 16], [15, 15, 3]])
    found = QuantisedEmbedding(matrix, torch.float32, kernels)(ids)
    assert torch.equal(found, meant[ids])
    assert QuantisedEmbedding(matrix, torch.bfloat16, kernels)(ids).dtype == torch.bfloat16


def test_activations_are_rounded_in_groups() -> None:
    x = torch.randn(3, 70) * torch.tensor([1.0] * 32 + [1000.0] * 32 + [0.0] * 6)
    rounded = round_activations(x)
    for begin in (0, 32):
        group = x[:, begin : begin + 32]
        step = group.abs().amax(-1, keepdim=True) / 127
        assert ((rounded[:, begin : begin + 32] - group).abs() <= step * 0.5001).all()
        steps = rounded[:, begin : begin + 32] / step
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert not rounded[:, 64:].any()


def _meant(store: ExpertStore, checkpoint: Path) -> PreTrainedModel:
    """Plain transformers with the weights that dense matrices stand for, and activations rounded for them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    dense, _ = read_dense(store)
    for name, form in store.index.quantised.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        rows, cols = form.shape
        module.weight.data = torch.from_numpy(dequantise(dense[name].numpy(), form.format, rows, cols).copy())
    model.tie_weights()
    quantised = {name.removesuffix(".weight") for name in store.index.quantised}
    if model.config.tie_word_embeddings:
        quantised.add("lm_head")
    for path in quantised:
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, arguments: (round_activations(arguments[0]),))
    return model


@pytest.fixture(params=["native", "off"])
def _kernels_used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "off":
        monkeypatch.setenv(VARIABLE, "off")
    load.cache_clear()
    yield
    monkeypatch.undo()
    load.cache_clear()


@pytest.mark.usefixtures("_kernels_used")
@pytest.mark.parametrize("family", ["ernie4_5_moe", "mixtral", "deepseek_v2"])
def test_a_quantised_store_computes_with_the_weights_meant(family: str, tmp_path: Path) -> None:
    """Tied and untied, biased and not: log-probabilities of a prompt by the engine and by transformers."""
    make_checkpoint(family, tmp_path / "checkpoint", seed=4)
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32", "int4")
    model = _meant(store, tmp_path / "checkpoint")
    prompt = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    how = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=VOCAB_SIZE)
    with running_engine(store.path, threads=1, max_step_tokens=24) as engine:
        (generated,) = generate(engine, [prompt], how)
        assert ("dense int4 weights are dequantised" in str(engine.info.fallbacks)) == bool(why_missing())
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
    told = [entry for output in generated.outputs for entry in output.prompt_logprobs or () if entry is not None]
    differences = torch.tensor(
        [
            max(abs(top.logprob - float(row[top.token_id])) for top in entry.top)
            for row, entry in zip(expected[:-1], told, strict=True)
        ]
    )
    assert float(differences.median()) <= QUANTISED_DENSE_LOGITS.allowed
    assert float(differences.max()) <= QUANTISED_DENSE_WORST.allowed
