"""Training, deltas and exports are one function: what is exported computes what was trained, whoever routes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from expertd_engine.convert import main
from expertd_engine.errors import ModelError
from expertd_engine.prepare import prepare
from expertd_engine.refactor.delta import load_student, save_delta
from expertd_engine.refactor.dense import open_dense
from expertd_engine.refactor.export import export
from expertd_engine.refactor.selection import select
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.statistics import gather
from expertd_engine.refactor.student import Student
from refactor.tiny import (
    CPU,
    HEADS,
    INDEX,
    LAYERS,
    LOW_RANK,
    SHARED,
    corpus,
    dense,
    make_gemma,
    statistics,
    write_texts,
)
from support.tiny_mixtral import make_dense, make_llama

KINDS = {"index": INDEX, "heads": HEADS, "layers": LAYERS, "low-rank index": LOW_RANK, "shared basis": SHARED}


def _student(shape: Shape) -> Student:
    """With every trained weight moved off its beginning."""
    return _moved(Student(dense(), shape, select(statistics(), shape)))


def _moved(student: Student) -> Student:
    generator = torch.Generator().manual_seed(1)
    for tensor in student.trained().values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05
    return student.eval()


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    student = _student(KINDS[kind])
    export(student, dense(), tmp_path / "out", torch.float32)
    model = _load(tmp_path / "out")
    ids = torch.arange(240).view(4, 60)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, student.logits(ids), rtol=0, atol=3e-5)
    standard = KINDS[kind].routing == Routing.LAYERS
    assert type(model).__name__ == ("Qwen2MoeForCausalLM" if standard else "PregatedLlamaForCausalLM")
    store = prepare(tmp_path / "out", tmp_path / "store", "float32")
    assert store.index.top_k == KINDS[kind].top_k
    assert [layer.num_experts for layer in store.index.layers] == [KINDS[kind].experts] * 3


@pytest.mark.parametrize("shape", [INDEX, LAYERS], ids=["index", "layers"])
def test_a_gemma_is_exported_too(shape: Shape, tmp_path: Path) -> None:
    """GELU, norms around 1, scaled embeddings with a tied head, heads that do not fill the hidden size."""
    gemma = make_gemma(tmp_path / "gemma")
    found = gather(gemma, corpus(), windows=2, length=64, sampled_tokens=120)
    student = _moved(Student(gemma, shape, select(found, shape)))
    export(student, gemma, tmp_path / "out", torch.float32)
    ids = torch.arange(240).view(4, 60)
    with torch.inference_mode():
        torch.testing.assert_close(_load(tmp_path / "out")(ids).logits, student.logits(ids), rtol=0, atol=3e-5)
    assert prepare(tmp_path / "out", tmp_path / "store", "float32").index.layers[0].num_experts == shape.experts


def test_what_no_class_of_ours_expresses_is_refused_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, message in (
        ("qwen2", "a refactored qwen2 cannot be exported: allowed are llama, mistral, gemma"),
        ("llama", "a refactored llama with attention_bias cannot be exported"),
    ):
        make_dense(tmp_path / kind, kind, **({"attention_bias": True} if kind == "llama" else {}))
        texts = write_texts(tmp_path / "texts")
        assert main([str(tmp_path / kind), str(tmp_path / "out"), "--texts", str(texts), "--device", "cpu"]) == 3
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("kind", ["index", "heads"])
def test_routes_of_pieces_are_the_routes_of_the_whole(kind: str, tmp_path: Path) -> None:
    export(_student(KINDS[kind]), dense(), tmp_path / "out", torch.float32)
    model = _load(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(12):
            length = int(torch.randint(2, 100, (), generator=generator))
            ids = torch.randint(0, 256, (1, length), generator=generator)
            model(ids)
            whole = model.routes.index
            cuts = sorted({0, length, *torch.randint(1, length, (3,), generator=generator).tolist()})
            cache, pieces = DynamicCache(config=model.config), []
            for begin, end in pairwise(cuts):
                model(ids[:, begin:end], past_key_values=cache, use_cache=True)
                pieces.append(model.routes.index)
            assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_a_route_depends_on_no_later_token() -> None:
    student = _student(INDEX)
    ids = torch.arange(100, 140)[None]
    changed = ids.clone()
    changed[0, 25:] = 7
    with torch.inference_mode():
        before, after = student.route_logits(ids), student.route_logits(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("kind", ["low-rank index", "shared basis"])
def test_a_delta_gives_the_model_back(kind: str, tmp_path: Path) -> None:
    student = _student(KINDS[kind])
    save_delta(student, tmp_path / "delta.safetensors")
    back = load_student(dense(), tmp_path / "delta.safetensors")
    assert back.shape == student.shape
    assert all(
        torch.equal(getattr(back.selection, name), getattr(student.selection, name))
        for name in ("permanent", "experts", "fresh")
    )
    found = back.trained()
    for name, tensor in student.trained().items():
        step = tensor.abs().amax(dim=-1, keepdim=True) / 127 if tensor.ndim > 1 else 1e-3
        assert ((tensor - found[name]).abs() <= 0.6 * step).all(), name


def test_a_delta_of_another_model_is_refused(tmp_path: Path) -> None:
    save_delta(_student(LOW_RANK), tmp_path / "delta.safetensors")
    make_llama(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"3 layers .* this one 2 layers"):
        load_student(open_dense(tmp_path / "other", CPU), tmp_path / "delta.safetensors")
    (tmp_path / "noise").write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="holds no trained model"):
        load_student(dense(), tmp_path / "noise")


def test_untrained_experts_that_take_all_neurons_are_the_dense_model() -> None:
    """Permanent and disjoint experts of every neuron, all chosen with equal weights: nothing is lost."""
    shape = Shape(Routing.LAYERS, 32, 2, 2, 48, 56)
    student = Student(dense(), shape, select(statistics(), shape))
    for block in student.blocks:
        assert block.gate is not None
        block.gate.weight.data.zero_()
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(student.logits(ids), dense().model(ids).logits, rtol=0, atol=3e-5)


def test_the_baseline_is_not_exported(tmp_path: Path) -> None:
    shape = Shape(Routing.NONE, permanent=64)
    with pytest.raises(ModelError, match="without experts"):
        export(Student(dense(), shape, select(statistics(), shape)), dense(), tmp_path / "out")


def test_shapes_that_cannot_be_are_refused() -> None:
    for wrong, message in (
        ({"top_k": 9}, "9 of 8 experts"),
        ({"width": 12}, "from the dense model"),
        ({"width": 20}, "multiples of 8"),
        ({"routing": Routing.INDEX}, "an index chooses one"),
    ):
        with pytest.raises(ModelError, match=message):
            dataclasses.replace(LAYERS, **wrong)
