"""One forward pass of transformers' modules on made-up tokens, seen layer by layer: what the native path is held to.

Experts are stood in for by a function of their input, their ids and their weights, so that routes show in the output
and no record is read. What attention is asked for (scale, window, sinks) is taken from the calls themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertd_engine.model.attention import AttentionBatch
from expertd_engine.model.kv_storage import KVStorage, LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.step_routes import KnownRoutes
from expertd_engine.model.step_rows import Span

_SPANS = ((0, 29), (None, 19))
"""Start and length of the probe's sequences; None: far enough on that every window has moved past its beginning."""
_FAR = 1000
_BEYOND_WINDOW = 7


class NotMatched(Exception):
    """This model, or a layer of it, is none that the native path computes; the text says why."""


@dataclass(frozen=True, slots=True)
class AttentionAsked:
    """One layer's attention as its module called it."""

    scale: float
    window: int | None
    sinks: Tensor | None
    """`[heads]`."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Angles at every position: `cos` and `sin` `[positions, rotary_dim / 2]` in float32."""

    cos: Tensor
    sin: Tensor

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[1]


@dataclass(slots=True)
class LayerSeen:
    """One decoder layer of the probe: `[rows, hidden]` in and out, in the model's dtype."""

    module: nn.Module
    given: Tensor
    gave: Tensor
    attention: AttentionAsked
    rope: RopeTable | None


@dataclass(frozen=True, slots=True)
class Witness:
    """The probe and all that was seen."""

    token_ids: list[int]
    positions: list[int]
    spans: list[Span]
    storage: KVStorage
    """Holds the keys and values that the modules wrote; block 1 and up belong to the spans."""
    num_blocks: int
    layers: list[LayerSeen]
    logits: Tensor
    """`[rows, V]`."""
    routes: KnownRoutes | None
    """What a router ahead of all layers chose, where the model has one."""


class StandInExperts:
    """A cheap function of everything that routed experts depend on."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The interface of `MoELayer.forward`."""
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        self.compute(hidden.float(), top_k_index, top_k_weights.float(), out)
        return out.to(hidden.dtype)

    def compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor) -> None:
        """The interface of `MoELayer.compute`."""
        out.add_(hidden * (top_k_weights * (1.0 + top_k_index / 8)).sum(-1, keepdim=True))


class _Recorder:
    """Attention as usual, and a note of how it was asked."""

    def __init__(self, batch: AttentionBatch) -> None:
        self._batch = batch
        self.asked: dict[int, AttentionAsked] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        self.asked[layer] = AttentionAsked(scale, window, None if sinks is None else sinks.flatten())
        return self._batch.attend(layer, query, key, value, scale, window, sinks)


class _Hooks:
    """What passes the borders of the decoder layers and the rotary embeddings."""

    def __init__(self, layers: Sequence[nn.Module], positions: int) -> None:
        self.given: list[Tensor] = []
        self.gave: list[Tensor] = []
        self.rope: list[RopeTable | None] = []
        self._layers = layers
        self._num_positions = positions
        self._tables: list[tuple[Tensor, RopeTable]] = []

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        rotary = [m for m in model.modules() if any(name.endswith("inv_freq") for name in m._buffers)]
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.register_forward_pre_hook(self._before, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._after))
            for module in rotary:
                stack.enter_context(module.register_forward_hook(self._rotary, with_kwargs=True))
            yield

    def _before(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else options["hidden_states"]
        self.given.append(hidden[0].clone())
        angles = options.get("position_embeddings")
        first = angles[0] if isinstance(angles, tuple) else angles
        self.rope.append(next((table for cos, table in self._tables if cos is first), None))

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.gave.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    def _rotary(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        table = _rope_table(module.forward, arguments, options, self._num_positions)
        if table is not None:
            self._tables.append((output[0], table))


def _rope_table(
    rotary: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], positions: int
) -> RopeTable | None:
    """The same call for every position, in float32; None if its answer is no cosine and sine of half the dimensions.

    Rope types that depend on the batch are refused when a model is prepared, so one call answers for all.
    """

    def everywhere(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.float() if value.is_floating_point() else torch.arange(positions)[None]

    answer = rotary(*map(everywhere, arguments), **{name: everywhere(value) for name, value in options.items()})
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(t.is_floating_point() for t in answer)):
        return None
    cos, sin = (_once(t[0]).contiguous() for t in answer)
    return RopeTable(cos, sin)


def _once(angles: Tensor) -> Tensor:
    """`[positions, rotary_dim]`, written twice over, half after half or number after number: one of the two."""
    half = angles.shape[1] // 2
    for first, second in ((angles[:, :half], angles[:, half:]), (angles[:, ::2], angles[:, 1::2])):
        if torch.equal(first, second):
            return first
    return angles


def decoder_layers(model: Any) -> list[nn.Module]:
    """Raises NotMatched."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NotMatched(f"{type(model.base_model).__name__} has no list of layers")
    return list(layers)


@torch.inference_mode()
def witness(loaded: LoadedModel, shapes: Sequence[LayerShape], block_tokens: int, max_positions: int) -> Witness:
    """Run the probe through the modules. Experts' layers are put back as they were. Raises NotMatched."""
    layers = decoder_layers(loaded.model)
    if len(layers) != len(shapes) - (loaded.pregating is not None):
        raise NotMatched(f"{len(layers)} decoder layers have {len(shapes)} attention layers")
    spans, num_blocks = _spans(_windowed_start(loaded, max_positions), block_tokens, max_positions)
    storage = KVStorage(shapes, num_blocks, block_tokens, loaded.dtype)
    recorder = _Recorder(AttentionBatch(spans, storage))
    hooks = _Hooks(layers, max_positions)
    positions = [p for span in spans for p in range(span.start, span.start + span.length)]
    token_ids = [(7919 * i + 13) % loaded.vocab_size for i in range(len(positions))]
    with hooks.on(loaded.model), stood_in(loaded):
        output = loaded.model(
            input_ids=torch.tensor([token_ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            expertd_batch=recorder,
        )
    seen = [
        LayerSeen(layer, hooks.given[i], hooks.gave[i], recorder.asked[i], hooks.rope[i])
        for i, layer in enumerate(layers)
    ]
    routes = None
    if loaded.pregating is not None:
        routes = KnownRoutes.of(loaded.model.routes.index, loaded.model.routes.weights)
    return Witness(token_ids, positions, spans, storage, num_blocks, seen, output.logits[0].float(), routes)


@contextmanager
def stood_in(loaded: LoadedModel) -> Iterator[None]:
    """While entered, stand-ins take the place of all experts."""
    before = [getattr(module, "expertd_layer", None) for module in loaded.moe_modules]
    for module in loaded.moe_modules:
        module.expertd_layer = StandInExperts()  # type: ignore[assignment]  # a plain attribute, not a submodule
    try:
        yield
    finally:
        for module, layer in zip(loaded.moe_modules, before, strict=True):
            module.expertd_layer = layer  # type: ignore[assignment]  # a plain attribute, not a submodule


def _windowed_start(loaded: LoadedModel, max_positions: int) -> int:
    window = getattr(loaded.model.config, "sliding_window", None) or 0
    return max(window + _BEYOND_WINDOW, min(_FAR, max_positions))


def _spans(far: int, block_tokens: int, max_positions: int) -> tuple[list[Span], int]:
    """Spans and the blocks that they need with the null block. Blocks before a span are the null block: keys of zero,
    which cost no memory however far on the span begins."""
    spans: list[Span] = []
    row, block = 0, 1
    for start, length in _SPANS:
        begin = max(0, min(far, max_positions - length)) if start is None else start
        length = min(length, max_positions - begin)
        first = begin // block_tokens
        count = -(-(begin + length) // block_tokens) - first
        spans.append(Span(row, begin, length, [0] * first + list(range(block, block + count))))
        row, block = row + length, block + count
    return spans, block
