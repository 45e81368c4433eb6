"""Incomplete checkpoints, full disks and killed runs leave no store behind; the command says why in one line."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expertd_engine.errors import ModelError, ResourceError, StoreError, UsageError
from expertd_engine.experts.store import ExpertStore, is_store
from expertd_engine.prepare import main, prepare
from support.tiny_mixtral import EXPERT_11, make_llama, make_mixtral, rewritten


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"lacks 1 weights of the model: model.norm.weight"),
        ({EXPERT_11: None}, r"has 11 of 12 experts"),
        ({EXPERT_11: None, EXPERT_11.replace("11", "12"): torch.zeros(48, 32)}, r"has 12 of 12 experts"),
        ({EXPERT_11: torch.zeros(40, 32)}, r"mlp.experts.gate_up_proj has shape \[88, 32\], .* wants \[96, 32\]"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight has shape \[31\], but the model wants \[32\]"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, r"does not know: .*q_proj.bias"),
        ({"model.norm.weight_scale_inv": torch.zeros(1)}, r"does not know: model.norm.weight_scale_inv"),
    ],
)
def test_checkpoints_that_do_not_fit_the_model_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    make_mixtral(tmp_path / "checkpoint")
    with rewritten(tmp_path / "checkpoint") as tensors:
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
    with pytest.raises(ModelError, match=message):
        prepare(tmp_path / "checkpoint", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_old_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    with rewritten(tmp_path / "checkpoint") as tensors:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    assert is_store(prepare(tmp_path / "checkpoint", tmp_path / "store").path)


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "truncated")
    shard = next((tmp_path / "truncated").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(ModelError, match=shard.name):
        prepare(tmp_path / "truncated", tmp_path / "store")
    make_mixtral(tmp_path / "lacking")
    shard = next((tmp_path / "lacking").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        prepare(tmp_path / "lacking", tmp_path / "store")
    with pytest.raises(ModelError, match=r"it has no config.json"):
        prepare(tmp_path / "absent", tmp_path / "store")
    make_mixtral(tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        prepare(tmp_path / "mute", tmp_path / "store")
    with pytest.raises(UsageError, match="experts format 'int3' is not known: allowed are float32, bf16, int8, int4"):
        prepare(tmp_path / "mute", tmp_path / "store", "int3")
    with pytest.raises(UsageError, match="dense format 'q8' is not known"):
        prepare(tmp_path / "mute", tmp_path / "store", "int8", "q8")
    assert not (tmp_path / "store").exists()


KILLED_HALFWAY = """
import os, signal, sys
from pathlib import Path
from expertd_engine.prepare import prepare

def killing(stage, fraction):
    if stage == "experts" and fraction > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(Path(sys.argv[1]), Path(sys.argv[2]), progress=killing)
"""


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_tidies(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    store = tmp_path / "store"
    command = [sys.executable, "-c", KILLED_HALFWAY, str(tmp_path / "checkpoint"), str(store)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    leftovers = {path for path in tmp_path.iterdir() if path.name != "checkpoint"}
    assert leftovers and not any(is_store(path) for path in leftovers)
    with pytest.raises(StoreError):
        ExpertStore.open(store)
    prepare(tmp_path / "checkpoint", store).verify()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "store"}


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(ResourceError, match=r"disk full while writing .*store"):
            prepare(tmp_path / "checkpoint", tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_too_little_space_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mixtral(tmp_path / "checkpoint")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"not enough disk space for .*store: \d{6} bytes needed, 1000 free"):
        prepare(tmp_path / "checkpoint", tmp_path / "store")


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=r"cannot write .*file/store"):
        prepare(tmp_path / "checkpoint", tmp_path / "file" / "store")


def test_only_a_store_is_ever_replaced_and_only_when_told(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    first = prepare(tmp_path / "checkpoint", tmp_path / "store", "bf16")
    with pytest.raises(ModelError, match="exists already"):
        prepare(tmp_path / "checkpoint", tmp_path / "store", "float32")
    assert ExpertStore.open(first.path).index == first.index
    replaced = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32", force=True)
    assert replaced.index.experts_format == "float32"
    with pytest.raises(ModelError, match="exists already"):
        prepare(tmp_path / "checkpoint", tmp_path / "checkpoint", force=True)
    (tmp_path / "empty").mkdir()
    assert is_store(prepare(tmp_path / "checkpoint", tmp_path / "empty").path)


def test_command_prepares_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mixtral(tmp_path / "checkpoint")
    checkpoint, store = str(tmp_path / "checkpoint"), str(tmp_path / "store")
    assert main([checkpoint, store, "--experts", "int4", "--dense", "int8", "--name", "mine", "--verify"]) == 0
    index = ExpertStore.open(tmp_path / "store").index
    assert (index.name, index.experts_format, index.dense_format) == ("mine", "int4", "int8")
    assert main([store, "--verify"]) == 0
    with (tmp_path / "store" / "experts.bin").open("r+b") as file:
        file.write(b"\xff" * 8)
    capsys.readouterr()
    assert main([store, "--verify"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("expertd: error: ") and error.count("\n") == 1 and "layer 0, expert 0" in error


def test_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path / "dense")
    assert main([str(tmp_path / "dense"), str(tmp_path / "store")]) == 3
    assert "dense model without experts; `expertd convert`" in capsys.readouterr().err
    assert main([str(tmp_path / "dense"), "--verify"]) == 3
    assert "is not an expert store" in capsys.readouterr().err
    assert main([str(tmp_path / "dense")]) == 2
