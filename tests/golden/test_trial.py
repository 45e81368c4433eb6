"""The trial at start: it finds what makes a row's bits depend on its batch or its chunk, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import expertd_engine.model.step_model as step_model
from expertd_engine.experts.store import ExpertStore
from expertd_engine.model import attention, expert_torch
from expertd_engine.model.loader import load_model
from expertd_engine.model.trial import Trial
from expertd_engine.prepare import prepare
from support.engine import running_engine
from support.tiny_mixtral import make_mixtral

FORMATS = ("bf16", "float32")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By format."""
    folder = tmp_path_factory.mktemp("models")
    make_mixtral(folder / "mixtral", intermediate_size=40)
    return {name: prepare(folder / "mixtral", folder / name, name).path for name in FORMATS}


def is_invariant(store: Path) -> bool:
    opened = ExpertStore.open(store)
    return Trial(load_model(opened), opened, 16, 256).is_invariant()


@pytest.mark.parametrize("experts_format", FORMATS)
def test_the_trial_finds_nothing_where_nothing_is_wrong(stores: dict[str, Path], experts_format: str) -> None:
    assert is_invariant(stores[experts_format])


def test_the_trial_notices_rows_that_are_not_padded(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_model, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(expert_torch, "ROW_MULTIPLE", 1)
    assert not is_invariant(stores["float32"])


@pytest.mark.parametrize("experts_format", FORMATS)
def test_the_trial_notices_keys_that_follow_the_chunk(
    stores: dict[str, Path], experts_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = attention._kernel

    def following(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
        known = int(keys.any(-1).any(0).nonzero().max()) + 1
        return kernel(query, keys[:, :known], values[:, :known], mask[..., :known], *rest)

    monkeypatch.setattr(attention, "_kernel", following)
    assert not is_invariant(stores[experts_format])


def test_the_trial_notices_experts_that_depend_on_the_number_of_rows(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ffn = expert_torch.expert_ffn

    def drifting(module: torch.nn.Module, record: Any, x: torch.Tensor) -> torch.Tensor:
        return ffn(module, record, x) * (1 + 1e-3 * len(x))

    monkeypatch.setattr(expert_torch, "expert_ffn", drifting)
    assert not is_invariant(stores["bf16"])


def test_per_batch_numerics_are_said(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "is_invariant", lambda self: False)
    monkeypatch.setattr(Trial, "largest_step_bytes", lambda self, *sizes: 0)
    with running_engine(stores["bf16"], threads=1, max_model_len=128) as engine:
        assert engine.info.numerics == "per-batch"
        assert any("numerics" in fallback for fallback in engine.info.fallbacks)
