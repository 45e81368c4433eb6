"""The tiny checkpoints are what later tests take them for: loadable, on-disk like real ones, and nowhere idle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertd_engine.families import find_experts
from support.tiny_checkpoints import make_checkpoint, make_model, make_tokenizer
from support.tiny_families import FAMILIES, VOCAB_SIZE

PROMPT = torch.arange(40, 68)[None]
STACKED_ON_DISK = {"gpt_oss", "granitemoe"}


def _logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(PROMPT).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_loads_back(family: str, tmp_path: Path) -> None:
    made = make_model(family, seed=4)
    make_checkpoint(family, tmp_path, seed=4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    state = loaded.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    # Not bit for bit: granitemoe moves by 4e-7 although every tensor is equal.
    torch.testing.assert_close(_logits(loaded), _logits(made), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_lie_on_disk_under_their_original_names(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, seed=4, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        per_expert = [name for name in file.keys() if ".experts.0." in name]  # noqa: SIM118 - not a dict
    assert bool(per_expert) != (family in STACKED_ON_DISK)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_one_routed_expert_changes_the_logits(family: str) -> None:
    model = make_model(family, seed=4)
    before = _logits(model)
    for _, experts in find_experts(model):
        chosen = _most_chosen(model, experts)
        down = experts.state_dict()["down_proj"]
        kept = down[chosen].clone()
        down[chosen] = 0
        assert (_logits(model) - before).abs().max() > 1e-3
        down[chosen] = kept
    assert torch.equal(_logits(model), before)


def _most_chosen(model: nn.Module, experts: nn.Module) -> int:
    counts: Counter[int] = Counter()
    hook = experts.register_forward_pre_hook(lambda module, arguments: counts.update(arguments[1].flatten().tolist()))
    _logits(model)
    hook.remove()
    return counts.most_common(1)[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_matters(family: str) -> None:
    """Negating a tensor moves the logits: a loader that drops or defaults any of them cannot pass unseen."""
    model = make_model(family, seed=4)
    before = _logits(model)
    idle = [name for name, tensor in model.state_dict().items() if not _matters(model, tensor, before)]
    assert idle == []


def _matters(model: nn.Module, tensor: Tensor, before: Tensor) -> bool:
    kept = tensor.clone()
    tensor.neg_()  # not a multiple: a norm right after the experts (flex_olmo) would hide it
    moved = not torch.allclose(_logits(model), before, rtol=0, atol=1e-5)
    tensor.copy_(kept)
    return moved


@pytest.mark.parametrize(
    ("family", "switch", "off"),
    [
        ("mixtral", "sliding_window", None),
        ("qwen2_moe", "norm_topk_prob", False),
        ("qwen2_moe", "sliding_window", 1000),
        ("qwen3_moe", "norm_topk_prob", False),
        ("qwen3_moe", "sliding_window", None),
        ("olmoe", "clip_qkv", None),
        ("deepseek_v2", "topk_method", "greedy"),
        ("deepseek_v2", "routed_scaling_factor", 1.0),
        ("deepseek_v3", "topk_group", 4),
        ("deepseek_v3", "norm_topk_prob", False),
        ("deepseek_v3", "routed_scaling_factor", 1.0),
        ("gpt_oss", "sliding_window", 1000),
        ("granitemoe", "embedding_multiplier", 1.0),
        ("granitemoe", "logits_scaling", 1.0),
        ("granitemoe", "residual_multiplier", 1.0),
        ("granitemoe", "attention_multiplier", 1.0),
        ("phimoe", "sliding_window", None),
        ("phimoe", "router_jitter_noise", 0.01),
        ("glm4_moe", "topk_group", 3),
        ("glm4_moe", "routed_scaling_factor", 1.0),
        ("glm4_moe", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
    ],
)
def test_every_switch_matters(family: str, switch: str, off: object) -> None:
    on = make_model(family, seed=4)
    config = FAMILIES[family]()
    assert getattr(config, switch) != off
    setattr(config, switch, off)
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other.load_state_dict(on.state_dict())
    assert (_logits(other) - _logits(on)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_differ_and_repeat(family: str) -> None:
    first, again, other = (_logits(make_model(family, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_tokenizer_round_trips_any_text(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hé, 世界!\n\tok <turn>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCAB_SIZE > max(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
