"""The pre-gated model as a transformers class: a Llama whose FFNs are experts that a decoupled router chooses.

The router is the model's last attention layer as far as caches are concerned: `num_hidden_layers` counts it. Its routes
for a forward pass are known before the first layer runs. Importing this module makes transformers know the class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeMLP

from expertd_engine.refactor.router import PregatingRouter, RouterShape


class PregatedLlamaConfig(LlamaConfig):  # type: ignore[misc]  # the library publishes no types
    """A Llama's configuration and the experts'. With `router_heads` of 1 one index holds in all layers."""

    model_type = "pregated_llama"

    num_experts: int = 8
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 64
    router_heads: int = 1
    router_width: int = 256
    router_attention_heads: int = 4
    router_inner: int = 512

    @property
    def router_shape(self) -> RouterShape:
        return RouterShape(
            int(self.hidden_size), self.router_heads * self.num_experts, self.router_width,
            self.router_attention_heads, self.router_inner,
        )  # fmt: skip


class Routes:
    """The running forward pass's choices: `index` and `weights` `[heads, T, K]`."""

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.weights: Tensor | None = None

    def choose(self, logits: Tensor, heads: int, top_k: int) -> None:
        """Of router logits `[B, T, heads · E]`. One choice has weight 1; more share softmax's weights among them."""
        each = logits.reshape(-1, heads, logits.shape[-1] // heads).transpose(0, 1)
        chosen, self.index = softmax(each.float(), dim=-1).topk(top_k, dim=-1)
        self.weights = chosen / chosen.sum(dim=-1, keepdim=True)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Experts and weights `[T, K]` of a layer."""
        assert self.index is not None and self.weights is not None, "no routes: the layer ran outside its model"
        head = layer if len(self.index) > 1 else 0
        return self.index[head], self.weights[head]


class PregatedFeedForward(nn.Module):
    """Stands in for a Llama's `mlp`: the permanent part and the experts its model's router chose."""

    routes_are_given = True
    """To who looks for a router beside the experts."""

    def __init__(self, config: PregatedLlamaConfig, layer: int, routes: Routes) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        permanent = config.shared_expert_intermediate_size
        self.shared_expert = Qwen2MoeMLP(config, intermediate_size=permanent) if permanent else None
        self.experts = Qwen2MoeExperts(config)
        self._layer, self._routes = layer, routes

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        index, weights = self._routes.of(self._layer)
        out = self.experts(x, index, weights.to(x.dtype))
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out.view(hidden.shape)  # type: ignore[no-any-return]  # nn.Module's call


class PregatedLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # the library publishes no types
    """A Llama behind its own router. Takes tokens, not embeddings: the router reads them."""

    config_class = PregatedLlamaConfig

    def __init__(self, config: PregatedLlamaConfig) -> None:
        super().__init__(config)
        del self.model.layers[-1]  # the one that stands for the router
        self.routes = Routes()
        for number, layer in enumerate(self.model.layers):
            layer.mlp = PregatedFeedForward(config, number, self.routes)
        self.router = PregatingRouter(config.router_shape, len(self.model.layers))
        self.router.attention.config = config  # attention functions ask their module for it
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        routes: tuple[Tensor, Tensor] | None = None,
        **extra: Any,
    ) -> Any:
        """As `LlamaForCausalLM.forward`, but for `inputs_embeds`. `routes`: experts and weights `[heads, B · T, K]` of
        all tokens, where somebody has run the router already."""
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        if routes is None:
            self.route(input_ids, attention_mask, position_ids, past_key_values, **extra)
        else:
            self.routes.index, self.routes.weights = routes
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, labels=labels, logits_to_keep=logits_to_keep, **extra,
        )  # fmt: skip

    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: Any, **extra: Any
    ) -> Tensor:
        """Choose all layers' experts for `input_ids` `[B, T]`, and answer the router's logits `[B, T, outputs]`."""
        embeddings = self.model.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        kind = self.config._attn_implementation
        logits: Tensor = self.router(
            embeddings, position_ids, mask, past_key_values, "sdpa" if kind == "eager" else kind, **extra
        )
        self.routes.choose(logits, self.config.router_heads, self.config.num_experts_per_tok)
        return logits


AutoConfig.register(PregatedLlamaConfig.model_type, PregatedLlamaConfig)
AutoModelForCausalLM.register(PregatedLlamaConfig, PregatedLlamaForCausalLM)
