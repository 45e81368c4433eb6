"""Who computes a step's logits, and how transformers' own modules do: on padded rows, with paged attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch.nn.functional import pad

from expertd_engine.model.attention import Attend, AttentionBatch
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.numerics import ROW_MULTIPLE, InvariantSigmoids
from expertd_engine.model.step_routes import KnownRoutes, StepRoutes
from expertd_engine.model.step_rows import StepRows


class StepModel(Protocol):
    """Who computes a step's logits: the native path (`native_model`), or transformers' modules."""

    def forward(
        self, rows: StepRows, storage: KVStorage, layers: Sequence[MoELayer], routes: StepRoutes
    ) -> torch.Tensor:
        """Logits `[len(logit_rows), V]` in float32. Keys and values go into `storage`; `layers` are the experts."""
        ...

    def embeddings(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What stands before the first layer, `[len(token_ids), H]` in float32."""
        ...


class ModuleModel:
    """A step through transformers' own modules."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def forward(
        self, rows: StepRows, storage: KVStorage, layers: Sequence[MoELayer], routes: StepRoutes
    ) -> torch.Tensor:
        return forward(self._loaded, layers, routes, AttentionBatch(rows.spans, storage), rows)

    def embeddings(self, token_ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            rows: torch.Tensor = self._loaded.model.get_input_embeddings()(torch.tensor(token_ids)).float()
        return rows


@torch.inference_mode()
def forward(
    loaded: LoadedModel,
    layers: Sequence[MoELayer],
    routes: StepRoutes,
    attend: Attend,
    rows: StepRows,
) -> torch.Tensor:
    """Logits `[len(logit_rows), V]` in float32.

    Tokens and logit rows are padded to a multiple of four (see `numerics.ROW_MULTIPLE`), in bfloat16 too: many families
    compute their routers in float32 whatever the weights. The padding reaches neither experts nor keys and values.
    """
    for layer in layers:
        layer.step = routes
    known = {} if routes.known is None else {"routes": _padded_routes(routes.known)}
    with InvariantSigmoids() if loaded.float32_sigmoids else nullcontext():
        output = loaded.model(
            input_ids=_padded(rows.ids)[None],
            position_ids=_padded(rows.positions)[None],
            use_cache=False,
            logits_to_keep=_padded(rows.logit_rows or [0]),
            expertd_batch=attend,
            **known,
        )
    logits: torch.Tensor = output.logits[0, : len(rows.logit_rows)].float()
    return logits


def _padded_routes(known: KnownRoutes) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights with rows for the padding."""
    experts, weights = known.tensors
    rows = (0, 0, 0, -experts.shape[1] % ROW_MULTIPLE)
    return pad(experts, rows), pad(weights, rows)


def _padded(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor([*values, *[0] * (-len(values) % ROW_MULTIPLE)], dtype=torch.long)
