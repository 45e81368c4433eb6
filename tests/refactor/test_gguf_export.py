"""A standard checkpoint written as GGUF is the same function in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd_engine.convert import main
from expertd_engine.errors import ModelError
from expertd_engine.refactor.export import export
from expertd_engine.refactor.gguf_export import write_gguf
from expertd_engine.refactor.selection import select
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.student import Student
from golden.tolerances import LLAMA_CPP_LOGITS
from refactor.tiny import INDEX, LAYERS, dense, statistics
from support.llama_cpp import llama_logits

FINE = Shape(Routing.LAYERS, permanent=16, experts=64, top_k=8, from_dense=1, width=8)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
IDS = list(range(60, 120))


def _export(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> Path:
    """A model with every trained weight moved off its beginning."""
    student = Student(dense(), shape, select(statistics(), shape))
    generator = torch.Generator().manual_seed(1)
    for tensor in student.trained().values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05
    export(student.eval(), dense(), folder, dtype)
    return folder


def _vocabulary(path: Path, tokens: int = 260) -> Path:
    """A GGUF file of bytes and special tokens, and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *SPECIAL][:tokens]
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([int(gguf.TokenType.BYTE)] * 256 + [int(gguf.TokenType.CONTROL)] * (len(names) - 256))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("shape", [LAYERS, FINE], ids=["8 experts", "64 experts"])
def test_llama_cpp_computes_what_transformers_does(shape: Shape, tmp_path: Path) -> None:
    folder = _export(tmp_path / "moe", shape)
    assert main(["--gguf", str(_vocabulary(tmp_path / "v.gguf")), str(folder), str(tmp_path / "moe.gguf")]) == 0
    found = llama_logits(tmp_path / "moe.gguf", IDS).log_softmax(-1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    assert float((found - expected).abs().max()) <= LLAMA_CPP_LOGITS.allowed


def test_bfloat16_stays_and_the_vocabulary_comes_along(tmp_path: Path) -> None:
    folder = _export(tmp_path / "moe", LAYERS, torch.bfloat16)
    write_gguf(folder, _vocabulary(tmp_path / "v.gguf"), tmp_path / "moe.gguf")
    reader = gguf.GGUFReader(tmp_path / "moe.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-4:] == list(SPECIAL)
    kinds = {one.name: one.tensor_type for one in reader.tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == gguf.GGMLQuantizationType.BF16
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path) -> None:
    words = _vocabulary(tmp_path / "v.gguf")
    with pytest.raises(ModelError, match=r"model_type is 'pregated_llama'; allowed is 'qwen2_moe'"):
        write_gguf(_export(tmp_path / "index", INDEX), words, tmp_path / "out.gguf")
    folder = _export(tmp_path / "moe", LAYERS)
    with pytest.raises(ModelError, match="a vocabulary of 258 tokens, the checkpoint one of 260"):
        write_gguf(folder, _vocabulary(tmp_path / "small.gguf", 258), tmp_path / "out.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="is no GGUF file"):
        write_gguf(folder, tmp_path / "noise.gguf", tmp_path / "out.gguf")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"norm_topk_prob": False}, "norm_topk_prob is False; allowed is True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type llama3 cannot be written"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            write_gguf(folder, words, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))
