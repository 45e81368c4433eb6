"""What virtual mode foresees of the next layer is what that layer's own norm and router choose of the same state."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from expertd_engine.model.loader import load_model
from expertd_engine.model.router_kinds import RouterAdapter, adapt_router
from expertd_engine.model.virtual_foresight import next_layers
from expertd_engine.prepare import prepare
from support.tiny_checkpoints import make_checkpoint

ROWS = 5


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss", "phimoe"])
def test_the_next_layer_is_asked_about_the_present_state(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model", seed=3)
    store = prepare(tmp_path / "model", tmp_path / "store", "float32")
    model = load_model(store).model
    names = [layer.module for layer in store.index.layers]
    routers = [router for name in names if isinstance(router := adapt_router(model, name), RouterAdapter)]
    foresight = next_layers(model, names, routers)
    state = torch.randn(ROWS, routers[0].hidden_size, generator=torch.Generator().manual_seed(0))
    layers = [model.get_submodule(name.partition(".mlp.")[0]) for name in names]
    norms = [layer.get_submodule("post_attention_layernorm") for layer in layers]
    for layer, (norm, following) in enumerate(pairwise(norms)):
        with torch.inference_mode():
            logits = routers[layer + 1].logits(following(state))
            best = logits.topk(routers[layer + 1].top_k, dim=1)
            for row in range(ROWS):
                told = foresight.expected(layer, norm(state[row : row + 1]))
                assert sorted(told) == sorted(best.indices[row].tolist())
                shares = best.values[row].softmax(dim=0).tolist()
                assert [told[e] for e in best.indices[row].tolist()] == pytest.approx(shares, rel=1e-3)
            together = foresight.expected(layer, norm(state))
        assert sum(together.values()) == pytest.approx(ROWS, rel=1e-5)
        assert set(together) == set(best.indices.flatten().tolist())
