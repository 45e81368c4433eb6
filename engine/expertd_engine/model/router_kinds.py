"""Router adapters for the MoE families of transformers: which router class selects how, and that rule under a mask.

A rule is declared per *behaviour*, and router classes are listed under it by name: importing their modules to compare
types would load every family, and older transformers lack some. `check_adapter` compares an adapter with the module it
wraps, so a class that changes its behaviour under the same name is found at `prepare`.

Every block listed here hands its experts the very hidden states its router saw, so an experts function can route
again under a mask by `adapter.select(adapter.logits(hidden), mask)`, without replacing the router's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from expertd_engine.families import find_experts
from expertd_engine.model.router_rules import (
    Groups,
    RouterKind,
    Rule,
    ScoreTopK,
    SparseMixer,
    TopKSoftmax,
    share,
    share_safe,
    sigmoid_scores,
    softmax_scores,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHECK_ROWS = 64


@dataclass(eq=False)
class RouterAdapter:
    """Logits and selection of one layer's own router `module`, which sees hidden states `[T, hidden_size]`.

    Every family computes softmax and top-k inside its router's `forward`; virtual mode, predictors and scores need the
    logits, and the selection under a mask. Without one, both are bit-equal to the module's.
    """

    kind: RouterKind
    num_experts: int
    top_k: int
    hidden_size: int
    hidden_dtype: torch.dtype
    module: nn.Module
    _project: Callable[[Tensor], Tensor]
    rule: Rule
    _forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Router logits `[T, E]` of `hidden` `[T, H]`, bit-equal to the module's."""
        return self._project(hidden)

    def select(self, logits: Tensor, mask: Tensor | None = None, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Chosen experts `[T, K]` and weights `[T, K]`, in the module's own order. With `top_k`, so many are chosen,
        where the rule is one of any number.

        Raises ValueError for a mask of another dtype or shape, and for a row that leaves fewer than K experts; the
        latter is checked on the CPU only, since reading a mask back from an accelerator would stall the step.
        """
        if mask is not None:
            self._check_mask(mask, logits.shape[0])
        rule = self.rule
        if top_k is not None and isinstance(rule, ScoreTopK | TopKSoftmax):
            rule = replace(rule, top_k=top_k)
        return rule(logits, mask)

    def rule_on(self, device: torch.device) -> Rule:
        """The rule for logits on `device`, wherever the module's parameters are."""
        if not isinstance(self.rule, ScoreTopK) or self.rule.bias is None:
            return self.rule
        bias = self.rule.bias().to(device)
        return replace(self.rule, bias=lambda: bias)

    def native(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the module itself answers for `hidden` `[T, H]`: logits `[T, E]`, experts and weights `[T, K]`."""
        first, weights, last = self._forward(hidden)
        # transformers 5.17's granitemoe answers (index, weights, logits), every other (logits, weights, index).
        logits, index = (first, last) if first.is_floating_point() else (last, first)
        return logits, index, weights

    def _check_mask(self, mask: Tensor, rows: int) -> None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}; it must be torch.bool")
        if tuple(mask.shape) not in ((self.num_experts,), (rows, self.num_experts)):
            allowed = f"[{self.num_experts}] or [{rows}, {self.num_experts}]"
            raise ValueError(f"mask has shape {list(mask.shape)}; it must be {allowed}")
        if mask.device.type == "cpu" and mask.numel() and int(mask.sum(dim=-1).min()) < self.top_k:
            raise ValueError(
                f"a mask row allows {int(mask.sum(dim=-1).min())} experts; at least {self.top_k} are needed"
            )


@dataclass(frozen=True)
class _Behaviour:
    """How one group of router classes acts. `rule` answers None for a configuration it does not know.

    `router` and `block` (the module that holds router and experts) are `Any`: their attributes are each family's own.
    `rule` may keep no tensor, only ways to fetch one: the loader replaces parameters after the adapter is made.
    """

    kind: RouterKind
    rule: Callable[[Any, Any, torch.dtype], Rule | None]
    project: Callable[[Any, Tensor], Tensor]
    forward: Callable[[Any, Any, Tensor], tuple[Tensor, Tensor, Tensor]] = lambda router, block, hidden: router(hidden)


def _linear(router: Any, hidden: Tensor) -> Tensor:
    return linear(hidden, router.weight)


def _linear_float32(router: Any, hidden: Tensor) -> Tensor:
    return linear(hidden.float(), router.weight.float())


def _linear_in_weight_dtype(layer: Any, hidden: Tensor) -> Tensor:
    return linear(hidden.to(layer.weight.dtype), layer.weight)


def _flagged_softmax(router: Any, block: Any, dtype: torch.dtype) -> Rule:
    return ScoreTopK(router.top_k, softmax_scores, share if router.norm_topk_prob else None)


def _deepseek_v2(router: Any, block: Any, dtype: torch.dtype) -> Rule | None:
    groups = None
    if router.topk_method == "group_limited_greedy":
        groups = Groups(router.num_group, router.topk_group, best=1)
    elif router.topk_method != "greedy":
        return None
    return ScoreTopK(router.top_k, softmax_scores, scale=router.routed_scaling_factor, groups=groups, ordered=False)


def _ernie(router: Any, block: Any, dtype: torch.dtype) -> Rule:
    return ScoreTopK(
        router.top_k,
        softmax_scores,
        normalise=lambda weights: weights / weights.sum(dim=-1, keepdim=True).clamp(min=router.norm_min),
        bias=lambda: router.moe_statics.e_score_correction_bias.squeeze(),
        dtype=dtype,
    )


def _deepseek_v3(router: Any, block: Any, dtype: torch.dtype) -> Rule:
    return ScoreTopK(
        router.top_k,
        sigmoid_scores,
        normalise=share_safe if router.norm_topk_prob else None,
        scale=router.routed_scaling_factor,
        bias=lambda: router.e_score_correction_bias,
        groups=Groups(router.num_group, router.topk_group, best=2) if router.num_group > 1 else None,
        ordered=False,
    )


def _minimax_m2(router: Any, block: Any, dtype: torch.dtype) -> Rule:
    return ScoreTopK(
        router.top_k,
        sigmoid_scores,
        share,
        bias=lambda: block.e_score_correction_bias,
        ordered=False,
        dtype=torch.float32,
    )


def _afmoe(router: Any, block: Any, dtype: torch.dtype) -> Rule:
    return ScoreTopK(router.top_k, sigmoid_scores, share_safe, scale=router.route_scale, bias=lambda: block.expert_bias)


def _cohere2(router: Any, block: Any, dtype: torch.dtype) -> Rule | None:
    return TopKSoftmax(router.top_k, torch.float32) if router.expert_selection_fn == "softmax" else None


def _sparsemixer(router: Any, block: Any, dtype: torch.dtype) -> Rule | None:
    # The module picks two whatever its top_k says.
    return SparseMixer(router.router_jitter_noise) if router.top_k == 2 else None


_SOFTMAX, _TOPK, _SIGMOID = RouterKind.SOFTMAX_TOPK, RouterKind.TOPK_SOFTMAX, RouterKind.SIGMOID_GROUPED

_BEHAVIOURS: dict[tuple[str, ...], _Behaviour] = {
    ("MixtralTopKRouter",): _Behaviour(
        _SOFTMAX, lambda r, b, d: ScoreTopK(r.top_k, softmax_scores, share, dtype=torch.float32), _linear
    ),
    (
        "FlexOlmoTopKRouter",
        "MellumTopKRouter",
        "OlmoeTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
    ): _Behaviour(_SOFTMAX, _flagged_softmax, _linear),
    ("HunYuanMoEV1Gate",): _Behaviour(
        _SOFTMAX,
        lambda r, b, d: ScoreTopK(r.top_k, softmax_scores, share),
        lambda r, hidden: _linear_in_weight_dtype(r.wg, hidden),
    ),
    ("DeepseekV2TopkRouter",): _Behaviour(_SOFTMAX, _deepseek_v2, _linear_float32),
    ("Ernie4_5_MoeTopKRouter",): _Behaviour(_SOFTMAX, _ernie, _linear_float32),
    ("GptOssTopKRouter",): _Behaviour(
        _TOPK, lambda r, b, d: TopKSoftmax(r.top_k), lambda r, hidden: linear(hidden, r.weight, r.bias)
    ),
    ("GraniteMoeTopKRouter", "GraniteMoeSharedTopKRouter"): _Behaviour(
        _TOPK, lambda r, b, d: TopKSoftmax(r.top_k, dtype=d), lambda r, hidden: _linear(r, hidden).float()
    ),
    ("Cohere2MoeTopKRouter",): _Behaviour(_TOPK, _cohere2, _linear),
    (
        "DeepseekV3TopkRouter",
        "Dots1TopkRouter",
        "ExaoneMoeTopkRouter",
        "Glm4MoeLiteTopkRouter",
        "Glm4MoeTopkRouter",
        "SolarOpenTopkRouter",
    ): _Behaviour(_SIGMOID, _deepseek_v3, _linear_float32),
    ("MiniMaxM2TopKRouter",): _Behaviour(
        _SIGMOID,
        _minimax_m2,
        _linear_in_weight_dtype,
        lambda r, block, hidden: r(hidden, block.e_score_correction_bias),
    ),
    ("AfmoeTokenChoiceRouter",): _Behaviour(
        _SIGMOID,
        _afmoe,
        lambda r, hidden: _linear(r.gate, hidden).float(),
        lambda r, block, hidden: r(hidden[None], block.expert_bias),
    ),
    ("PhimoeTopKRouter",): _Behaviour(RouterKind.SPARSEMIXER, _sparsemixer, _linear),
}
_BY_CLASS = {name: behaviour for names, behaviour in _BEHAVIOURS.items() for name in names}


def adapt_router(model: nn.Module, experts_module_name: str) -> RouterAdapter | None:
    """The adapter of the router beside the experts module of that name in `model`; None if it is of no known kind.

    `model` is a transformers model; its parameters may still be on meta, or be replaced later. Raises AttributeError
    if `model` has no module of that name.
    """
    model.get_submodule(experts_module_name)
    block: Any = model.get_submodule(experts_module_name.rpartition(".")[0])
    routers = [child for child in block.children() if type(child).__name__ in _BY_CLASS]
    return _adapt(routers[0], block, model) if len(routers) == 1 else None


def _adapt(router: Any, block: Any, model: Any) -> RouterAdapter | None:
    behaviour = _BY_CLASS[type(router).__name__]
    rule = behaviour.rule(router, block, model.dtype)
    if rule is None:
        return None
    return RouterAdapter(
        kind=behaviour.kind,
        num_experts=router.num_experts,
        top_k=router.top_k,
        hidden_size=model.config.get_text_config().hidden_size,
        hidden_dtype=model.dtype,
        module=router,
        _project=lambda hidden: behaviour.project(router, hidden),
        rule=rule,
        _forward=lambda hidden: behaviour.forward(router, block, hidden),
    )


def router_kind_of(model: nn.Module) -> RouterKind | None:
    """The kind that all of the model's routers share; None if there are none, or one is of no kind or of another."""
    adapters = [adapt_router(model, name) for name, _ in find_experts(model)]
    kinds = {None if adapter is None else adapter.kind for adapter in adapters}
    return kinds.pop() if len(kinds) == 1 else None


def check_adapter(adapter: RouterAdapter, generator: torch.Generator) -> bool:
    """Whether the adapter without a mask is bit-equal to its module on random hidden states, in the module's order.

    Raises ValueError for a module in training mode, where a router may add noise.
    """
    if adapter.module.training:
        raise ValueError(f"{type(adapter.module).__name__} is in training mode; call eval() on the model first")
    hidden = torch.randn(_CHECK_ROWS, adapter.hidden_size, generator=generator, device=generator.device)
    device = next(adapter.module.parameters()).device
    hidden = hidden.to(device=device, dtype=adapter.hidden_dtype)
    with torch.inference_mode():
        logits, index, weights = adapter.native(hidden)
        own_logits = adapter.logits(hidden)
        own_index, own_weights = adapter.select(own_logits)
    pairs = ((logits, own_logits), (index, own_index), (weights, own_weights))
    return all(theirs.dtype == own.dtype and torch.equal(theirs, own) for theirs, own in pairs)
