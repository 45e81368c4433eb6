"""Preparing needs memory for the largest layer and 1 GiB, however big the checkpoint: in a cgroup of that size."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import MixtralConfig

from support.memory_cgroup import can_limit_memory, limited_memory, num_kills, run_inside
from support.tiny_checkpoints import make_tokenizer

HIDDEN, FFN, EXPERTS, VOCABULARY = 1024, 3584, 8, 260
LAYER_BYTES = 2 * 3 * HIDDEN * FFN * EXPERTS
LIMIT_BYTES = LAYER_BYTES + 2**30
LAYERS = -(-3 * LIMIT_BYTES // LAYER_BYTES)

PREPARE = """
import json, sys
from pathlib import Path
from expertd_engine.prepare import prepare

peak = 0

def watch(stage, fraction):
    global peak
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = max(peak, int(status["RssAnon"].split()[0]) * 1024)

store = prepare(Path(sys.argv[1]), Path(sys.argv[2]), progress=watch)
print(json.dumps({"anonymous": peak, "experts": store.index.expert_bytes_total()}))
"""


def _write_sparse_checkpoint(folder: Path) -> int:
    """A Mixtral of zeros that takes no disk space; returns its length. Read, it fills memory as any other would."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=EXPERTS, dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    shapes = {"model.norm.weight": [HIDDEN]}
    shapes |= {name: [VOCABULARY, HIDDEN] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.{norm}_layernorm.weight": [HIDDEN] for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
        shapes |= {f"{layer}.block_sparse_moe.gate.weight": [EXPERTS, HIDDEN]}
        for expert in (f"{layer}.block_sparse_moe.experts.{e}" for e in range(EXPERTS)):
            shapes |= {f"{expert}.{name}.weight": [FFN, HIDDEN] for name in ("w1", "w3")}
            shapes |= {f"{expert}.w2.weight": [HIDDEN, FFN]}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.skipif(not can_limit_memory(), reason="needs root and a memory cgroup")
def test_checkpoint_three_times_as_big_as_memory(tmp_path: Path) -> None:
    size = _write_sparse_checkpoint(tmp_path / "checkpoint")
    assert size >= 3 * LIMIT_BYTES
    needed = size * 5 // 4
    if (free := shutil.disk_usage(tmp_path).free) < needed:
        # Sparse files will not do: what is measured is a store being written, and that takes its bytes.
        pytest.skip(f"small disk: the store is written whole, {needed} bytes; {free} are free")
    with limited_memory(LIMIT_BYTES) as group:
        command = [sys.executable, "-c", PREPARE, str(tmp_path / "checkpoint"), str(tmp_path / "store")]
        done = run_inside(group, command, timeout_s=300)
        assert done.returncode == 0, done.stderr
        assert num_kills(group) == 0
        figures = json.loads(done.stdout)
        print(f"limit {LIMIT_BYTES}, charged at most {group.peak_bytes()}, checkpoint {size}, {figures}")
    shutil.rmtree(tmp_path / "store")  # pytest keeps the folders of its last runs, and this one is large
    assert figures["experts"] == LAYERS * LAYER_BYTES
    assert figures["anonymous"] < LIMIT_BYTES
