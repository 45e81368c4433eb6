"""Trial steps before serving: learn the shapes, check that numerics are invariant, measure the largest step.

Experts come from stand-in records of random numbers, so that a trial costs no reads, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import TensorSpec
from expertd_engine.kernels.formats import QUANTISED, STRIP_ROWS, quantise
from expertd_engine.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from expertd_engine.messages import Sampling
from expertd_engine.model.attention import AttentionBatch, ShapeRecorder
from expertd_engine.model.expert_torch import SlotViews
from expertd_engine.model.kv_storage import KVStorage, LayerShape
from expertd_engine.model.loader import LoadedModel, attach_experts
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.native_build import build_native
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.pregate import Pregate, build_pregate
from expertd_engine.model.sampler import SampleRow, sample
from expertd_engine.model.step_model import ModuleModel, StepModel, forward
from expertd_engine.model.step_routes import StepRoutes
from expertd_engine.model.step_rows import Span, StepRows
from expertd_engine.step_plan import SchedulerLimits

_PROBE_TOKENS = 41
_PROBE_CUTS = ((20, 9, 1, 1, 3, 7), (41,), (2, 39))
_LONG_ROWS = 64
"""Query rows of the longest-context trial: kernel calls are cut to a size, so more rows take time but no memory."""


class StandIns:
    """A lease source with one slot for each record layout; every expert of a layer is the layer's stand-in."""

    def __init__(self, store: ExpertStore) -> None:
        layouts = store.index.layouts
        slab = Slab(len(layouts), max(layout.bytes for layout in layouts))
        self.views = SlotViews(slab.whole, slab.slot_bytes, layouts)
        self._slot_of_layer = [layer.layout for layer in store.index.layers]
        generator = torch.Generator().manual_seed(0)
        for slot, layout in enumerate(layouts):
            raw = self.views.raw(slot, slot)
            for spec in layout.tensors:
                _fill(raw[spec.name], spec, generator)

    def lease(
        self, layer: int, experts: Sequence[int], *, pairs: Sequence[int], scanned: Container[int] = ()
    ) -> _AllGranted:
        return _AllGranted([(index, self._slot_of_layer[layer]) for index in range(len(experts))])


class _AllGranted(AbstractContextManager["_AllGranted"]):
    """Leases that are all there at once."""

    def __init__(self, taken: list[tuple[int, int]]) -> None:
        self._taken = taken

    def __exit__(self, *_: object) -> None:
        return None

    def take(self) -> list[tuple[int, int]]:
        return self._taken

    def release(self, indices: Iterable[int]) -> None:
        return None


def _fill(tensor: torch.Tensor, spec: TensorSpec, generator: torch.Generator) -> None:
    """Random weights; in a quantised tensor every strip is the first one over again."""
    if spec.dtype not in QUANTISED:
        tensor.normal_(0, 0.02, generator=generator)
        return
    strip = torch.empty(STRIP_ROWS, spec.shape[1]).normal_(0, 0.02, generator=generator)
    packed = torch.from_numpy(quantise(strip.numpy(), spec.dtype))
    tensor.view(-1, len(packed))[:] = packed


class Trial:
    """Runs trial steps on a loaded model; leaves nothing attached that serving would use."""

    def __init__(self, loaded: LoadedModel, store: ExpertStore, block_tokens: int, max_positions: int) -> None:
        self._loaded = loaded
        self._stand_ins = StandIns(store)
        self._layers: list[MoELayer] = attach_experts(loaded, store, self._stand_ins.views)
        self._block_tokens = block_tokens
        self.peak_is_exact = True
        """Whether the largest step was measured alone; else its bytes count from the highest mark since start."""
        self.shapes = self._learn_shapes()
        self.pregate: Pregate | None = None
        """What routes ahead of all layers, where the model has such a router."""
        self.router_not_native: str | None = None
        """Why that is not native; None if it is, or there is none."""
        if loaded.pregating is not None:
            self.pregate, self.router_not_native = build_pregate(loaded, max_positions)
        self.model: StepModel = ModuleModel(loaded)
        """What steps are computed by."""
        self.not_native: str | None = None
        """Why it is not the native path; None if it is."""
        try:
            self.model = build_native(loaded, self.shapes, block_tokens, max_positions)
        except NotMatched as reason:
            self.not_native = str(reason)

    def is_invariant(self) -> bool:
        """Whether one sequence's logits keep their bits over several cuts into steps, alone and beside others."""
        tokens = [(7919 * i + 13) % self._loaded.vocab_size for i in range(_PROBE_TOKENS)]
        results = [self._probe(tokens, cuts, beside) for beside in (False, True) for cuts in _PROBE_CUTS]
        return all(torch.equal(results[0], other) for other in results[1:])

    def largest_step_bytes(self, limits: SchedulerLimits) -> int:
        """Bytes that the largest step adds at its peak, from the kernel's high-water mark of this process.

        A full step of one token repeated, which sends every row to the same experts; reads as many logits as a step
        may; samples with every option on; and, since attention's memory grows with context alone, one layer's attention
        over the longest context.
        """
        self.peak_is_exact = reset_peak_rss()
        before = rss_bytes()
        self._full_step(limits.max_step_tokens, limits.max_rows + limits.max_scored_tokens)
        step = peak_rss_bytes() - before
        if self.not_native is None:
            return max(0, step)
        reset_peak_rss()
        before = rss_bytes()
        self._longest_attention(limits.max_model_len)
        return max(0, step) + max(0, peak_rss_bytes() - before)

    def _full_step(self, max_step_tokens: int, logit_rows: int) -> None:
        storage = self._storage(max_step_tokens)
        spans = [Span(0, 0, max_step_tokens, self._blocks(max_step_tokens))]
        rows = [i % max_step_tokens for i in range(logit_rows)]
        positions = list(range(max_step_tokens))
        logits = self._forward(StepRows([1] * max_step_tokens, positions, spans, rows), storage)
        options = Sampling(top_p=0.9, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=20)
        sample(logits[0], SampleRow(options, 0, [1], [1], ()))  # rows are sampled one after the other

    def _longest_attention(self, max_model_len: int) -> None:
        shape = max(self.shapes, key=lambda s: s.kv_heads * (s.key_dim + s.value_dim + s.group))
        rows = min(_LONG_ROWS, max_model_len)
        storage = KVStorage([shape], 2, self._block_tokens, self._loaded.dtype)
        blocks = [1] * -(-max_model_len // self._block_tokens)
        batch = AttentionBatch([Span(0, max_model_len - rows, rows, blocks)], storage)
        query = torch.ones(rows, shape.kv_heads, shape.group, shape.key_dim, dtype=self._loaded.dtype)
        key, value = query[:, :, 0], query.new_ones(rows, shape.kv_heads, shape.value_dim)
        with torch.inference_mode():
            batch.attend(0, query, key, value, 0.1, None, None)

    def _probe(self, tokens: list[int], cuts: Sequence[int], beside: bool) -> torch.Tensor:
        storage = self._storage(2 * _PROBE_TOKENS + 2 * self._block_tokens)
        size = self._block_tokens
        mine = self._blocks(_PROBE_TOKENS)
        others = list(range(len(mine) + 1, 2 * len(mine) + 1))
        logits = []
        start = 0
        for length in cuts:
            spans = [Span(0, start, length, mine)]
            step_tokens, positions = tokens[start : start + length], list(range(start, start + length))
            if beside:
                count = 1 + start % 3
                spans.append(Span(length, start, count, others))
                step_tokens = step_tokens + tokens[:count]
                positions = positions + list(range(start, start + count))
                assert start + count <= len(others) * size
            logits.append(self._forward(StepRows(step_tokens, positions, spans, range(length)), storage))
            start += length
        return torch.cat(logits)

    def _learn_shapes(self) -> list[LayerShape]:
        recorder = ShapeRecorder()
        forward(self._loaded, self._layers, StepRoutes(1, self._stand_ins), recorder, StepRows([0], [0], [], [0]))
        return recorder.in_order()

    def _forward(self, rows: StepRows, storage: KVStorage) -> torch.Tensor:
        known = None
        if self.pregate is not None:
            known = self.pregate.known([self.pregate.route(rows.ids, rows.positions, rows.spans, storage)])
        return self.model.forward(rows, storage, self._layers, StepRoutes(len(rows.ids), self._stand_ins, known=known))

    def _storage(self, num_tokens: int) -> KVStorage:
        num_blocks = 1 + -(-num_tokens // self._block_tokens)
        return KVStorage(self.shapes, num_blocks, self._block_tokens, self._loaded.dtype)

    def _blocks(self, num_tokens: int) -> list[int]:
        return list(range(1, 1 + -(-num_tokens // self._block_tokens)))
