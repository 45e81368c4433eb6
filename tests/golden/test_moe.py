"""Our experts function against transformers' own, and sums that do not depend on arrival or on batch mates."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from expertd_engine.experts.slab import PAGE, Slab
from expertd_engine.experts.store_format import RecordLayout, TensorSpec
from expertd_engine.families import find_experts
from expertd_engine.kernels.library import Pool, load, why_missing
from expertd_engine.model.expert_native import NativeExperts, expert_layout
from expertd_engine.model.expert_torch import SlotViews, TorchExperts
from expertd_engine.model.moe import ExpertKernel, MoELayer
from expertd_engine.model.step_routes import StepRoutes
from support.tiny_checkpoints import make_model

FAMILIES = {
    "mixtral": "gate and up in one",
    "gpt_oss": "transposed, interleaved, with biases and an activation of its own",
    "granitemoe": "stacked on disk",
    "deepseek_v3": "behind a router with groups",
}
DTYPES = (torch.float32, torch.bfloat16)


def canonical(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's expert parameters as records have them: gate and up apart, each matrix `[E, outputs, inputs]`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        is_bias = name.endswith("_bias")
        whole = parameter.detach() if is_bias or not module.is_transposed else parameter.detach().transpose(1, 2)
        if name.startswith("gate_up_proj"):
            gate, up = whole.chunk(2, dim=1) if module.is_concatenated else (whole[:, 0::2], whole[:, 1::2])
            tensors[name.replace("gate_up", "gate")] = gate
            tensors[name.replace("gate_up", "up")] = up
        else:
            tensors[name] = whole
    return {name: tensor.float() if name.endswith("_bias") else tensor for name, tensor in tensors.items()}


class InSlots(AbstractContextManager["InSlots"]):
    """All experts of one module in slots, in reverse; they are granted `at_once` at a time, the last first."""

    def __init__(self, module: torch.nn.Module, at_once: int = 1000) -> None:
        parameters = canonical(module)
        self.num_experts = len(next(iter(parameters.values())))
        specs, offset = [], 0
        for name, tensor in parameters.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs.append(TensorSpec(name, dtype, list(tensor.shape[1:]), offset))
            offset += -(-tensor[0].nbytes // 64) * 64
        layout = RecordLayout("any", -(-offset // PAGE) * PAGE, specs)
        slab = Slab(self.num_experts, layout.bytes)
        self.views = SlotViews(slab.whole, layout.bytes, [layout])
        self.slot_of = [self.num_experts - 1 - e for e in range(self.num_experts)]
        for expert, slot in enumerate(self.slot_of):
            for name, view in self.views.get(slot, 0).items():
                view.copy_(parameters[name][expert])
        self.at_once = at_once
        self.leased: list[int] = []
        self.waiting: list[int] = []
        self.held: set[int] = set()
        self.ended = 0

    def lease(
        self, layer: int, experts: Sequence[int], *, pairs: Sequence[int] = (), scanned: Container[int] = ()
    ) -> InSlots:
        assert list(experts) == sorted(set(experts)) and len(pairs) == len(experts) and min(pairs) > 0
        self.leased += experts
        self.asked = list(experts)
        self.pairs = list(pairs)
        self.waiting = list(range(len(experts)))
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1

    def take(self) -> list[tuple[int, int]]:
        taken, self.waiting = self.waiting[-self.at_once :], self.waiting[: -self.at_once]
        self.held.update(taken)
        return [(index, self.slot_of[self.asked[index]]) for index in taken]

    def release(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.held.remove(index)


class World:
    def __init__(self, family: str, dtype: torch.dtype, pool: Pool | None = None) -> None:
        self.model = make_model(family, seed=0, dtype=dtype)
        self.module = find_experts(self.model)[-1][1]
        self.slots = InSlots(self.module)
        views = self.slots.views
        kernel: ExpertKernel = TorchExperts(self.module, views, 0)
        if pool is not None:
            kernel = NativeExperts(pool, expert_layout(self.module, views.layouts[0]), views)
        self.layer = MoELayer(0, kernel)
        self.hidden_size = int(self.model.config.hidden_size)

    def ours(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_rows: int | None = None
    ) -> torch.Tensor:
        self.layer.step = StepRoutes(len(hidden) if num_rows is None else num_rows, self.slots)
        with torch.inference_mode():
            return self.layer.forward(hidden, index, weights)

    def theirs(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.model.set_experts_implementation("eager")
        with torch.inference_mode():
            result: torch.Tensor = self.module(hidden, index, weights)
        return result

    def inputs(self, rows: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, self.hidden_size, generator=generator).to(dtype)
        scores = torch.rand(rows, self.slots.num_experts, generator=generator)
        weights, index = scores.topk(top_k, sorted=False)
        return hidden, index, weights.to(dtype)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    missing = why_missing()
    if missing is not None:
        pytest.skip(missing)
    with Pool(load(), 2) as opened:
        yield opened


@pytest.fixture(
    params=[(family, dtype, kernel) for family in FAMILIES for dtype in DTYPES for kernel in ("torch", "native")],
    ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}",
)
def world(request: pytest.FixtureRequest) -> Any:
    family, dtype, kernel = request.param
    native = request.getfixturevalue("pool") if kernel == "native" else None
    return World(family, dtype, native), dtype


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_it_computes_what_transformers_computes(world: tuple[World, torch.dtype], top_k: int) -> None:
    made, dtype = world
    for rows in (1, 2, 5, 24):
        inputs = made.inputs(rows, top_k, dtype)
        ours, theirs = made.ours(*inputs), made.theirs(*inputs)
        assert ours.dtype == dtype and ours.shape == theirs.shape
        scale = float(theirs.float().abs().max())
        tolerance = scale * (1e-5 if dtype == torch.float32 else 0.02)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance)


def test_a_row_does_not_depend_on_the_others(world: tuple[World, torch.dtype]) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(37, 3, dtype)
    expected = made.ours(hidden, index, weights)
    for first in range(0, 37, 5):
        for count in (1, 2, 3, 6, 32):
            rows = slice(first, first + count)
            assert torch.equal(made.ours(hidden[rows], index[rows], weights[rows]), expected[rows])


def test_a_row_does_not_depend_on_the_others_when_all_choose_the_same_experts(world: tuple[World, torch.dtype]) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(21, made.slots.num_experts, dtype)
    expected = made.ours(hidden, index, weights)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 21)):
        assert torch.equal(made.ours(hidden[rows], index[rows], weights[rows]), expected[rows])


def test_the_order_of_a_tokens_choices_does_not_matter(world: tuple[World, torch.dtype]) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(9, 5, dtype)
    expected = made.ours(hidden, index, weights)
    assert torch.equal(made.ours(hidden, index.flip(1), weights.flip(1)), expected)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("at_once", [1, 3])
def test_the_order_in_which_experts_arrive_does_not_matter(
    world: tuple[World, torch.dtype], rows: int, at_once: int
) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(rows, 5, dtype)
    expected = made.ours(hidden, index, weights)
    made.slots.at_once = at_once
    assert torch.equal(made.ours(hidden, index, weights), expected)
    assert not made.slots.held


def test_experts_are_asked_for_once_ascending_and_always_given_back(world: tuple[World, torch.dtype]) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(9, 2, dtype)
    made.ours(hidden, index, weights)
    assert made.slots.leased == sorted(set(index.flatten().tolist()))
    assert made.slots.ended == 1
    assert sum(made.slots.pairs) == 18


def test_padding_reaches_no_expert_and_comes_back_as_zeros(world: tuple[World, torch.dtype]) -> None:
    made, dtype = world
    hidden, index, weights = made.inputs(8, 2, dtype)
    index[:5], index[5:] = torch.tensor([0, 1]), torch.tensor([2, 3])
    hidden[5:] = torch.nan
    out = made.ours(hidden, index, weights, num_rows=5)
    assert made.slots.leased == [0, 1]
    assert torch.equal(out[:5], made.ours(hidden[:5], index[:5], weights[:5])) and not out[5:].any()


def test_scanned_are_the_experts_that_prompt_tokens_alone_chose() -> None:
    world = World("mixtral", torch.bfloat16)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3]])
    wanted = {None: set(), (): {0, 1, 2, 3}, (1,): {0, 3}, (0, 2): set()}
    for decode_rows, scanned in wanted.items():
        routes = StepRoutes(3, world.slots, decode_rows=None if decode_rows is None else list(decode_rows))
        found = routes.scanned(range(4), chosen.numpy())
        assert {expert for expert in range(4) if expert in found} == scanned
