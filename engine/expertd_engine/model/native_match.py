"""From a decoder layer's modules to what the native path computes: who recognises which module plays which part.

A layer is matched by its module graph: the names under which transformers' decoder layers hold attention, norms, router
and FFN, and the shapes of their weights. Every parameter must have found its part. Details that no name tells (which
dimensions rotate together, whether heads are normed before or after it) are left open: `variants` lists the
possibilities, and numbers decide (`native_build`). Any doubt is `NotMatched`, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expertd_engine.kernels.library import FORMATS, Matrix
from expertd_engine.model.dense import QuantisedEmbedding, QuantisedLinear
from expertd_engine.model.kv_storage import LayerShape
from expertd_engine.model.native_abi import Block, FeedForward, Norm, NormKind, Rope, Router, Scores
from expertd_engine.model.native_probe import activation_of, norm_kind
from expertd_engine.model.native_witness import LayerSeen, NotMatched
from expertd_engine.model.router_kinds import RouterAdapter
from expertd_engine.model.router_rules import (
    Rule,
    ScoreTopK,
    TopKSoftmax,
    share,
    share_safe,
    sigmoid_scores,
    softmax_scores,
)

_NORM_PLACES: dict[frozenset[str], dict[str, str]] = {
    frozenset(places.values()): places
    for places in (
        {"input_norm": "input_layernorm"},
        {"input_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        {"attention_norm": "post_attention_layernorm", "output_norm": "post_feedforward_layernorm"},
        {
            "input_norm": "input_layernorm",
            "attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "output_norm": "post_feedforward_layernorm",
        },
        {
            "input_norm": "input_layernorm",
            "attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_mlp_layernorm",
            "output_norm": "post_mlp_layernorm",
        },
    )
}
"""Names of a layer's norms → where each acts. One norm alone: attention and FFN read it side by side."""
_HEAD_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_SCORES = {softmax_scores: Scores.SOFTMAX, sigmoid_scores: Scores.SIGMOID}
_SHARE_EPSILONS: dict[Callable[[Tensor], Tensor] | None, float] = {None: 0.0, share: 0.0, share_safe: 1e-20}


@dataclass(eq=False)
class Matched:
    """One decoder layer. `keep` holds what `block`'s addresses point to."""

    block: Block
    keep: list[Tensor]
    experts: nn.Module | None
    """The routed experts' module; None in a dense layer."""
    adapter: RouterAdapter | None
    """Selects where the native path gives logits alone."""


class _Parts:
    """Fills a block and keeps account of the parameters that found their part."""

    def __init__(self) -> None:
        self.block = Block()
        self.keep: list[Tensor] = []
        self.claimed: set[int] = set()

    def claim(self, tensor: Tensor) -> Tensor:
        self.claimed.add(tensor.data_ptr())
        return tensor

    def vector(self, tensor: Tensor | None) -> int | None:
        """Its address in float32."""
        if tensor is None:
            return None
        return self._own(self.claim(tensor).detach().flatten().float().contiguous())

    def _own(self, tensor: Tensor) -> int:
        self.keep.append(tensor)
        return tensor.data_ptr()

    def matrix(self, module: Any) -> Matrix:
        """`module` (linear or embedding, quantised or not) as it lies in memory."""
        if isinstance(module, QuantisedLinear | QuantisedEmbedding):
            found = module.matrix
            return self._matrix(found.data, found.format, found.rows, found.cols, getattr(module, "bias", None))
        if type(module) not in (nn.Linear, nn.Embedding):
            raise NotMatched(f"{type(module).__name__} is no linear layer")
        return self.weight(module.weight, getattr(module, "bias", None))

    def weight(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        rows, cols = weight.shape
        return self._matrix(weight, str(weight.dtype).removeprefix("torch."), rows, cols, bias)

    def _matrix(self, data: Tensor, form: str, rows: int, cols: int, bias: Tensor | None) -> Matrix:
        if form not in FORMATS or not data.is_contiguous():
            raise NotMatched(f"no kernel reads a matrix of {form}")
        return Matrix(self._own(self.claim(data).detach()), self.vector(bias), FORMATS[form], rows, cols)

    def norm(self, module: nn.Module) -> Norm:
        """`module` as RMS norm or layer norm: whichever gives its numbers."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
            raise NotMatched(f"{type(module).__name__} is no norm that is known")
        kind = norm_kind(module, weight, bias, float(eps))
        return Norm(self.vector(weight), self.vector(bias), kind, len(weight), float(eps))


def match_layer(
    seen: LayerSeen, shape: LayerShape, find_router: Callable[[nn.Module], RouterAdapter | None]
) -> Matched:
    """The layer with everything but its rotation settled. Raises NotMatched."""
    parts = _Parts()
    children = dict(seen.module.named_children())
    attention = _only(children, lambda child: {"q_proj", "k_proj", "v_proj", "o_proj"} <= _names(child), "attention")
    ffn = _only(children, lambda child: _is_mlp(child) or _experts_of(child) is not None, "FFN")
    _place_norms(parts, children)
    _place_attention(parts, attention, seen, shape)
    experts = _experts_of(ffn)
    adapter = None
    if experts is None:
        parts.block.ffn = _mlp(parts, ffn)
    else:
        adapter = find_router(experts)
        _place_moe(parts, ffn, experts, adapter)
    residual = float(getattr(seen.module, "residual_multiplier", 1.0))
    averages = getattr(ffn, "shared_expert_combination_strategy", None) == "average"
    parts.block.attention_residual, parts.block.ffn_residual = residual, residual / 2 if averages else residual
    _check_claimed(seen.module, experts, parts)
    native = parts.block.router.scores != Scores.LOGITS
    return Matched(parts.block, parts.keep, experts, None if native else adapter)


def variants(matched: Matched, seen: LayerSeen) -> Iterator[tuple[Rope, bool]]:
    """What is left open, most usual first: which dimensions rotate together, and whether head norms come after."""
    fits = seen.rope is not None and seen.rope.rotary_dim <= matched.block.key_dim
    ropes = (Rope.HALVES, Rope.PAIRS, Rope.NONE) if fits else (Rope.NONE,)
    has_norms = matched.block.query_norm.kind != NormKind.NONE
    for rope in ropes:
        yield rope, False
        if has_norms and rope != Rope.NONE:
            yield rope, True


def set_variant(matched: Matched, seen: LayerSeen, variant: tuple[Rope, bool]) -> None:
    block = matched.block
    rope, block.norm_after_rope = variant
    block.rope = rope
    if seen.rope is not None:
        block.cos, block.sin = seen.rope.cos.data_ptr(), seen.rope.sin.data_ptr()
        block.positions, block.rotary_dim = len(seen.rope.cos), seen.rope.rotary_dim


def match_norm(module: nn.Module) -> tuple[Norm, list[Tensor]]:
    """A norm by itself, and what it points to. Raises NotMatched."""
    parts = _Parts()
    return parts.norm(module), parts.keep


def match_matrix(module: nn.Module) -> tuple[Matrix, list[Tensor]]:
    """A linear or embedding layer by itself, and what it points to. Raises NotMatched."""
    parts = _Parts()
    return parts.matrix(module), parts.keep


def _place_norms(parts: _Parts, children: dict[str, nn.Module]) -> None:
    names = frozenset(name for name in children if "norm" in name)
    places = _NORM_PLACES.get(names)
    if places is None:
        raise NotMatched(f"norms named {', '.join(sorted(names)) or 'nothing'}")
    for place, name in places.items():
        setattr(parts.block, place, parts.norm(children[name]))
    parts.block.parallel = len(places) == 1


def _place_attention(parts: _Parts, module: Any, seen: LayerSeen, shape: LayerShape) -> None:
    block, asked = parts.block, seen.attention
    for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        setattr(block, part, parts.matrix(getattr(module, name)))
    if "gate_proj" in _names(module):
        block.attention_gate = parts.matrix(module.gate_proj)
    for query, key in _HEAD_NORMS:
        if query in _names(module):
            block.query_norm, block.key_norm = parts.norm(getattr(module, query)), parts.norm(getattr(module, key))
    block.sinks = parts.vector(asked.sinks)
    block.window = asked.window or 0
    block.scale = asked.scale
    block.clip = float(getattr(module.config, "clip_qkv", None) or 0.0)
    block.hidden = block.query.cols
    block.heads, block.kv_heads = shape.kv_heads * shape.group, shape.kv_heads
    block.key_dim, block.value_dim = shape.key_dim, shape.value_dim


def _place_moe(parts: _Parts, ffn: Any, experts: Any, adapter: RouterAdapter | None) -> None:
    if adapter is None and not getattr(ffn, "routes_are_given", False):
        raise NotMatched(f"{type(ffn).__name__} has a router of no known kind")
    block = parts.block
    router = None if adapter is None else adapter.module
    if adapter is not None:
        block.router = _router(parts, adapter)
        for tensor in (*adapter.module.parameters(), *ffn.parameters(recurse=False)):
            parts.claim(tensor)  # what else a router has (selection biases) its adapter knows
    else:
        block.router.scores, block.router.top_k = Scores.GIVEN, int(ffn.top_k)
        block.router.experts = int(experts.num_experts)
    for name, child in ffn.named_children():
        if child is experts or child is router:
            continue
        if _is_mlp(child):
            block.ffn = _mlp(parts, child)
        elif getattr(child, "out_features", None) == 1:
            block.ffn_gate = parts.matrix(child)
        elif any(True for _ in child.parameters()):
            raise NotMatched(f"{type(ffn).__name__} has a part {name!r} that is not known")


def _router_matrix(parts: _Parts, adapter: RouterAdapter) -> Matrix:
    """The router's one matrix `[experts, hidden]`, its own or its only linear layer's."""
    shape = (adapter.num_experts, adapter.hidden_size)
    for module in adapter.module.modules():
        if isinstance(module, QuantisedLinear) and (module.out_features, module.in_features) == shape:
            return parts.matrix(module)
        weight = module._parameters.get("weight")
        if weight is not None and tuple(weight.shape) == shape:
            return parts.weight(weight, module._parameters.get("bias"))
    raise NotMatched(f"{type(adapter.module).__name__} has no matrix of {shape[0]} × {shape[1]}")


def _router(parts: _Parts, adapter: RouterAdapter) -> Router:
    """With the rule where native code has it, else for its logits alone."""
    rule: Rule = adapter.rule
    router = Router(matrix=_router_matrix(parts, adapter), experts=adapter.num_experts, top_k=adapter.top_k, scale=1.0)
    router.scores = Scores.LOGITS
    if isinstance(rule, TopKSoftmax):
        router.scores = Scores.CHOSEN
    elif isinstance(rule, ScoreTopK) and rule.score in _SCORES and rule.normalise in _SHARE_EPSILONS:
        router.scores, router.scale = _SCORES[rule.score], rule.scale
        router.shares, router.epsilon = rule.normalise is not None, _SHARE_EPSILONS[rule.normalise]
        router.bias = None if rule.bias is None else parts.vector(rule.bias())
        if rule.groups is not None:
            router.groups, router.groups_kept, router.group_best = rule.groups.count, rule.groups.kept, rule.groups.best
    return router


def _mlp(parts: _Parts, module: Any) -> FeedForward:
    gate, up, down = (parts.matrix(child) for child in (module.gate_proj, module.up_proj, module.down_proj))
    return FeedForward(gate, up, down, activation_of(module.act_fn))


def _is_mlp(module: nn.Module) -> bool:
    return _names(module) - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"} and hasattr(module, "act_fn")


def _experts_of(module: nn.Module) -> nn.Module | None:
    found = [
        child for child in module.children() if hasattr(child, "_apply_gate") and hasattr(child, "is_concatenated")
    ]
    return found[0] if len(found) == 1 else None


def _check_claimed(layer: nn.Module, experts: nn.Module | None, parts: _Parts) -> None:
    theirs = set() if experts is None else {id(tensor) for tensor in experts.parameters()}
    for name, tensor in layer.named_parameters():
        if id(tensor) not in theirs and tensor.data_ptr() not in parts.claimed:
            raise NotMatched(f"parameter {name!r} has no part that is known")


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _only(children: dict[str, nn.Module], test: Callable[[nn.Module], bool], what: str) -> nn.Module:
    found = [child for child in children.values() if test(child)]
    if len(found) != 1:
        raise NotMatched(f"{len(found)} parts look like {what}: {', '.join(children)}")
    return found[0]
