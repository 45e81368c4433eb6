"""Makes the native path of a loaded model and holds every layer of it to transformers' modules before it is used.

A layer that the matcher recognises is run natively on what its module was given in the probe (`native_witness`); its
output, keys and values must be the module's, but for rounding. What the module graph leaves open is tried out: the
variant with the smallest error counts, if that is small. One layer that differs, and the model runs as transformers has
it, with native experts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertd_engine.families import find_experts
from expertd_engine.kernels.library import KernelsMissing
from expertd_engine.model.dense import QuantisedLinear
from expertd_engine.model.kv_storage import KVStorage, LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_abi import Rope
from expertd_engine.model.native_match import Matched, match_layer, match_matrix, match_norm, set_variant, variants
from expertd_engine.model.native_model import TOKENS_ALIGNED, Ends, NativeModel
from expertd_engine.model.native_step import NativeLayer, StepMemory
from expertd_engine.model.native_witness import LayerSeen, NotMatched, StandInExperts, Witness, decoder_layers, witness
from expertd_engine.model.router_kinds import adapt_router

_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Allowed error of a row, relative to what the layer changes of it. Wrong structure gives errors near one."""
_ROUNDED = 0.02
"""Where activations are rounded to whole numbers for quantised matrices: a last bit turns some the other way."""
_ROWS_HELD = 0.75
"""Share of the rows that must be within: rounding turns a near tie of experts the other way in a few."""


def build_native(
    loaded: LoadedModel, shapes: Sequence[LayerShape], block_tokens: int, max_positions: int
) -> NativeModel:
    """The native path for positions below `max_positions`. Raises NotMatched with the reason why there is none.

    `shapes` are what the attention layers store, a pre-gating router's last. It runs the model's modules once, on
    stand-ins for its experts.
    """
    if loaded.pool is None:
        raise NotMatched("there are no native kernels")
    if block_tokens % TOKENS_ALIGNED:
        raise NotMatched(f"KV blocks of {block_tokens} tokens are no multiple of {TOKENS_ALIGNED}")
    with torch.inference_mode():
        seen = witness(loaded, shapes, block_tokens, max_positions)
        matched = _match_layers(loaded.model, seen.layers, shapes)
        moe = {module: index for index, module in enumerate(loaded.moe_modules)}
        layers = [_native_layer(one, layer, moe) for one, layer in zip(matched, seen.layers, strict=True)]
        model = _assemble(loaded, layers)
        storage = KVStorage(shapes, seen.num_blocks, block_tokens, loaded.dtype)
        rounds = any(isinstance(module, QuantisedLinear) for module in loaded.model.modules())
        judge = _Judge(model, seen, storage, _ROUNDED if rounds else _TOLERANCES[loaded.dtype])
        judge.judge_ends(loaded.model.config)
        judge.judge_layers(matched)
    return model


def _assemble(loaded: LoadedModel, layers: Sequence[NativeLayer]) -> NativeModel:
    assert loaded.pool is not None
    try:
        return NativeModel(loaded.pool, layers, _ends(loaded))
    except KernelsMissing as error:
        raise NotMatched(str(error)) from None


def _match_layers(model: Any, layers: Sequence[LayerSeen], shapes: Sequence[LayerShape]) -> list[Matched]:
    names = {module: name for name, module in find_experts(model)}
    matched = []
    for index, (layer, shape) in enumerate(zip(layers, shapes[: len(layers)], strict=True)):
        try:
            matched.append(match_layer(layer, shape, lambda experts: adapt_router(model, names[experts])))
        except NotMatched as error:
            raise NotMatched(f"layer {index} ({type(layer.module).__name__}): {error}") from None
    return matched


def _native_layer(matched: Matched, seen: LayerSeen, moe: dict[nn.Module, int]) -> NativeLayer:
    rope = () if seen.rope is None else (seen.rope.cos, seen.rope.sin)
    index = None if matched.experts is None else moe[matched.experts]
    return NativeLayer(matched.block, index, matched.adapter, [*matched.keep, *rope])


def _ends(loaded: LoadedModel) -> Ends:
    """The embedding, the last norm and the head; their scales are still to be found."""
    model, ahead = loaded.model, [] if loaded.pregating is None else [loaded.pregating]
    base, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    known = {id(p) for part in (*decoder_layers(model), embedding, head, *ahead) for p in part.parameters()}
    others = [child for child in base.children() if any(id(p) not in known for p in child.parameters())]
    if len(others) != 1:
        raise NotMatched(f"{len(others)} parts of {type(base).__name__} stand between its layers and its head")
    left = [
        name for name, p in model.named_parameters() if id(p) not in known | {id(p) for p in others[0].parameters()}
    ]
    if left:
        raise NotMatched(f"parameter {left[0]!r} has no part that is known")
    table, first = match_matrix(embedding)
    norm, middle = match_norm(others[0])
    matrix, last = match_matrix(head)
    return Ends(table, 1.0, norm, matrix, 1.0, [*first, *middle, *last])


class _Judge:
    """Compares the native path with the witness, part by part."""

    def __init__(self, model: NativeModel, seen: Witness, storage: KVStorage, tolerance: float) -> None:
        self._model = model
        self._seen = seen
        self._storage = storage
        self._tolerance = tolerance

    def judge_ends(self, config: Any) -> None:
        """Find the scales of embedding and logits. Raises NotMatched."""
        width = self._seen.layers[0].given.shape[1]
        entry = (1.0, getattr(config, "embedding_multiplier", None), width**0.5)
        error = self._try(self._set_embedding, entry, self._embedding_error)
        self._require(error, "the embedding")
        divisor = getattr(config, "logits_scaling", None)
        scales = (1.0, None if divisor is None else 1 / divisor, getattr(config, "logit_scale", None))
        error = self._try(self._set_logit_scale, scales, self._logits_error)
        self._require(error, "the last norm or the head")

    def judge_layers(self, matched: Sequence[Matched]) -> None:
        """Settle every layer's variant. Raises NotMatched."""
        winners: dict[Hashable, tuple[Rope, bool]] = {}
        for index, (one, layer) in enumerate(zip(matched, self._seen.layers, strict=True)):
            kind = _kind(one, layer)
            open_ones = [winners[kind]] if kind in winners else list(variants(one, layer))
            errors = []
            for variant in open_ones:
                set_variant(one, layer, variant)
                errors.append(self._layer_error(index))
            best = min(range(len(errors)), key=errors.__getitem__)
            set_variant(one, layer, open_ones[best])
            self._require(errors[best], f"layer {index} ({type(layer.module).__name__})")
            winners[kind] = open_ones[best]

    def _try(self, put: Callable[[float], None], values: Iterable[float | None], error: Callable[[], float]) -> float:
        """Put the value with the smallest error; that error."""
        found = []
        for value in dict.fromkeys(float(v) for v in values if v is not None):
            put(value)
            found.append((error(), value))
        put(min(found)[1])
        return min(found)[0]

    def _set_embedding(self, scale: float) -> None:
        self._model.ends.embedding_scale = scale

    def _set_logit_scale(self, scale: float) -> None:
        self._model.ends.logit_scale = scale

    def _embedding_error(self) -> float:
        first = self._seen.layers[0].given.float()
        return self._error(self._begin().activations.hidden, first, torch.zeros_like(first))

    def _logits_error(self) -> float:
        memory = self._begin()
        memory.activations.hidden.copy_(self._seen.layers[-1].gave)
        logits = self._model.logits(memory, range(len(self._seen.token_ids)))
        return self._error(logits, self._seen.logits, torch.zeros_like(logits))

    def _layer_error(self, index: int) -> float:
        layer, memory = self._seen.layers[index], self._begin()
        memory.activations.hidden.copy_(layer.given)
        self._model.run_alone(index, StandInExperts().compute, memory, self._seen.routes)
        errors = [self._error(memory.activations.hidden, layer.gave.float(), layer.given.float())]
        for ours, theirs in zip(
            self._stored(self._storage, index), self._stored(self._seen.storage, index), strict=True
        ):
            errors.append(self._error(ours, theirs, torch.zeros_like(theirs)))
        return max(errors)

    def _begin(self) -> StepMemory:
        seen = self._seen
        return self._model.begin(seen.token_ids, seen.positions, seen.spans, self._storage)

    def _stored(self, storage: KVStorage, index: int) -> list[Tensor]:
        """The probe's keys and values in one layer, a row for each token."""
        rows = []
        size = storage.block_tokens
        for pool in (storage.keys[index], storage.values[index]):
            places = [
                (s.blocks[p // size], p % size) for s in self._seen.spans for p in range(s.start, s.start + s.length)
            ]
            blocks, inside = zip(*places, strict=True)
            rows.append(pool[list(blocks), list(inside)].flatten(1).float())
        return rows

    def _error(self, ours: Tensor, theirs: Tensor, before: Tensor) -> float:
        """Of the worst row but for a quarter of them; infinite where numbers are not finite.

        What the modules' own type rounds off a large residual stream is no error.
        """
        rounding = torch.finfo(self._storage.dtype).eps * theirs.norm(dim=1)
        change = (theirs - before).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        error = ((ours - theirs).norm(dim=1) - rounding).clamp_min(0) / change
        return float(error.nan_to_num(torch.inf).sort().values[int(_ROWS_HELD * (len(error) - 1))])

    def _require(self, error: float, what: str) -> None:
        if error > self._tolerance:
            raise NotMatched(f"{what} differs from its module by {error:.2g}; allowed is {self._tolerance}")


def _kind(matched: Matched, layer: LayerSeen) -> Hashable:
    """Layers of one kind have their open details in common."""
    attention = (layer.attention.window is None, layer.attention.sinks is None, layer.rope is None)
    return type(layer.module), matched.experts is None, attention
