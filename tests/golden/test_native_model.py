"""The native path against transformers' modules, family by family; and the law of invariance, bit for bit.

Routed experts are stood in for by an exact function of their input and routes, so that all that is seen is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_engine.kernels.library import Pool
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.native_build import build_native
from expertd_engine.model.native_model import NativeModel
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.step_rows import Span, StepRows
from golden.tolerances import NATIVE_BF16_LOGITS, NATIVE_FLOAT32_LOGITS
from support.kernels import native_pool
from support.native_models import CONTEXT, ExactExperts, eager_model, load_tiny, no_routes, shapes_of
from support.tiny_families import TINY_FAMILIES

BLOCK = 16
TOKENS = 75
OTHER = 40
UNMATCHED = {"deepseek_v2", "deepseek_v3"}
"""Their keys and values come through a latent: transformers' modules run, with native experts."""
CUTS = ((TOKENS,), (1,) * TOKENS, (20, 9, 1, 1, 3, 7, 34), (2, 64, 9), (16, 16, 16, 16, 11))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with native_pool(threads=2) as pool:
        yield pool


class Native:
    """A family's native path with KV blocks for some sequences."""

    def __init__(self, family: str, pool: Pool, dtype: torch.dtype = torch.float32) -> None:
        loaded = load_tiny(family, pool, dtype)
        self.shapes, self.dtype = shapes_of(loaded), dtype
        self.model: NativeModel = build_native(loaded, self.shapes, BLOCK, CONTEXT)
        self.experts = [ExactExperts() for _ in loaded.moe_modules]

    def storage(self, sequences: int) -> KVStorage:
        return KVStorage(self.shapes, 1 + sequences * (CONTEXT // BLOCK), BLOCK, self.dtype)

    def step(self, storage: KVStorage, parts: Sequence[tuple[int, int, Sequence[int]]]) -> list[Tensor]:
        """One step of (sequence, start, tokens); each part's logits `[tokens, V]`."""
        spans: list[Span] = []
        row = 0
        for sequence, start, part in parts:
            first = 1 + sequence * (CONTEXT // BLOCK)
            spans.append(Span(row, start, len(part), list(range(first, first + CONTEXT // BLOCK))))
            row += len(part)
        ids = [token for _, _, part in parts for token in part]
        positions = [p for _, start, part in parts for p in range(start, start + len(part))]
        rows = StepRows(ids, positions, spans, range(len(ids)))
        logits = self.model.forward(rows, storage, self.experts, no_routes(len(ids)))
        return list(logits.split([len(part) for _, _, part in parts]))

    def run(self, tokens: Sequence[int], cuts: Sequence[int], mates: int = 0) -> Tensor:
        """All logits of `tokens`, cut into steps, beside others that are cut differently."""
        storage = self.storage(1 + mates)
        logits: list[Tensor] = []
        start = 0
        for index, length in enumerate(cuts):
            parts = [(0, start, tokens[start : start + length])]
            for mate in range(1, mates + 1):
                begin = (index * (1 + mate % 3)) % OTHER
                parts.append((mate, begin, tokens[begin : begin + 1 + mate % 4]))
            logits += self.step(storage, parts if index % 2 else parts[::-1])[:: 1 if index % 2 else -1][:1]
            start += length
        return torch.cat(logits)


def _tokens(count: int = TOKENS) -> list[int]:
    return [(7919 * i + 13) % 256 for i in range(count)]


def _reference(family: str) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = eager_model(family)(torch.tensor([_tokens()]), use_cache=False).logits[0]
    return logits.float()


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES - UNMATCHED))
def test_logits_are_those_of_transformers(family: str, pool: Pool) -> None:
    expected = _reference(family)
    for cuts in CUTS[:3]:
        ours = Native(family, pool).run(_tokens(), cuts)
        assert float((ours.log_softmax(-1) - expected.log_softmax(-1)).abs().max()) <= NATIVE_FLOAT32_LOGITS.allowed


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_bf16_logits_are_near(family: str, pool: Pool) -> None:
    """Weights, keys and values in bfloat16; compared with all of it in float32, where a near tie of experts turns."""
    expected = _reference(family)
    ours = Native(family, pool, torch.bfloat16).run(_tokens(), CUTS[2])
    error = (ours.log_softmax(-1) - expected.log_softmax(-1)).abs().amax(-1).median()
    assert float(error) <= NATIVE_BF16_LOGITS.allowed


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES - UNMATCHED))
def test_bits_depend_on_the_sequence_alone(family: str, pool: Pool) -> None:
    assert _is_invariant(Native(family, pool))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bits_depend_on_the_sequence_alone_in_bf16(family: str, pool: Pool) -> None:
    assert _is_invariant(Native(family, pool, torch.bfloat16))


def _is_invariant(native: Native) -> bool:
    """Whether a sequence has the same bits for every cut, and beside any number of others."""
    tokens = _tokens()
    whole = native.run(tokens, (TOKENS,))
    ways = [(cuts, 0) for cuts in CUTS[1:]] + [(CUTS[2], mates) for mates in (1, 7, 31)]
    return all(torch.equal(native.run(tokens, cuts, mates), whole) for cuts, mates in ways)


def test_bits_do_not_depend_on_threads_or_instructions(pool: Pool) -> None:
    library = pool.library
    best = library.instruction_set
    expected = Native("gpt_oss", pool).run(_tokens(), CUTS[2], 3)
    try:
        for name in library.available:
            library.use(name)
            for threads in (1, 3, 4):
                with Pool(library, threads) as other:
                    assert torch.equal(Native("gpt_oss", other).run(_tokens(), CUTS[2], 3), expected), (name, threads)
    finally:
        library.use(best)


@pytest.mark.parametrize("family", sorted(UNMATCHED))
def test_what_is_not_matched_says_why(family: str, pool: Pool) -> None:
    with pytest.raises(NotMatched, match=r"layer 0 \(Deepseek.*DecoderLayer\): 0 parts look like attention"):
        Native(family, pool)


def test_without_kernels_there_is_no_native_path() -> None:
    loaded = load_tiny("mixtral", None)
    with pytest.raises(NotMatched, match="no native kernels"):
        build_native(loaded, shapes_of(loaded), BLOCK, CONTEXT)


def _scale_attention(module: Any) -> None:
    module.self_attn.o_proj.register_forward_hook(lambda _, __, output: output * 1.02)


def _shift_keys(module: Any) -> None:
    module.self_attn.k_proj.register_forward_hook(lambda _, __, output: output.roll(1, -1))


def _scale_routes(module: Any) -> None:
    module.mlp.register_forward_hook(lambda _, __, output: output * 0.98)


def _square_norm(module: Any) -> None:
    module.input_layernorm.register_forward_hook(lambda _, __, output: output.square())


@pytest.mark.parametrize("change", [_scale_attention, _shift_keys, _scale_routes, _square_norm])
def test_a_layer_that_computes_something_else_is_found(change: Any, pool: Pool) -> None:
    loaded = load_tiny("mixtral", pool)
    change(loaded.model.model.layers[1])
    with pytest.raises(NotMatched, match=r"layer 1 \(MixtralDecoderLayer\)"):
        build_native(loaded, shapes_of(loaded), BLOCK, CONTEXT)


@pytest.mark.parametrize("change", [_shift_keys, _square_norm])
def test_a_layer_that_computes_something_else_is_found_in_bf16(change: Any, pool: Pool) -> None:
    loaded = load_tiny("mixtral", pool, torch.bfloat16)
    change(loaded.model.model.layers[1])
    with pytest.raises(NotMatched, match=r"layer 1 \(MixtralDecoderLayer\)"):
        build_native(loaded, shapes_of(loaded), BLOCK, CONTEXT)


def test_a_parameter_without_a_part_is_found(pool: Pool) -> None:
    loaded = load_tiny("mixtral", pool)
    layer = loaded.model.model.layers[2].self_attn
    layer.register_parameter("temperature", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(NotMatched, match=r"layer 2 .*'self_attn.temperature' has no part"):
        build_native(loaded, shapes_of(loaded), BLOCK, CONTEXT)


@pytest.mark.parametrize("part", ["embed_tokens", "norm"])
def test_ends_that_compute_something_else_are_found(part: str, pool: Pool) -> None:
    loaded = load_tiny("mixtral", pool)
    loaded.model.model.get_submodule(part).register_forward_hook(lambda _, __, output: output + 0.01)
    with pytest.raises(NotMatched, match=r"differs from its module|is neither an RMS norm nor a layer norm"):
        build_native(loaded, shapes_of(loaded), BLOCK, CONTEXT)


def test_a_position_beyond_the_table_is_refused(pool: Pool) -> None:
    native = Native("mixtral", pool)
    with pytest.raises(ValueError, match=f"position {CONTEXT} is not in the table"):
        native.step(native.storage(1), [(0, CONTEXT, [1])])


def test_a_token_that_does_not_exist_is_refused(pool: Pool) -> None:
    native = Native("mixtral", pool)
    with pytest.raises(ValueError, match="-1"):
        native.step(native.storage(1), [(0, 0, [-1])])


def test_a_step_may_ask_for_no_logits(pool: Pool) -> None:
    native = Native("mixtral", pool)
    rows = StepRows([1], [0], [Span(0, 0, 1, [1])], [])
    logits = native.model.forward(rows, native.storage(1), native.experts, no_routes(1))
    assert logits.shape == (0, native.model.ends.head.rows)


def test_a_step_after_one_that_failed_is_as_good_as_any(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that the failed step left behind reach no token."""
    native = Native("mixtral", pool)
    expected = native.run(_tokens(), (5,))

    def fail(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor) -> None:
        out += 1.0
        raise MemoryError

    native.run(_tokens(), (5,))
    with monkeypatch.context() as planted, pytest.raises(MemoryError):
        planted.setattr(native.experts[1], "compute", fail)
        native.run(_tokens(), (5,))
    assert torch.equal(native.run(_tokens(), (5,)), expected)
