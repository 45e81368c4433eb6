"""Models whose routes are known ahead, in the real engine: the router incremental and whole, and answers unchanged."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd_engine.errors import ConfigError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.kernels.library import Pool, why_missing
from expertd_engine.messages import Sampling
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.loader import load_model
from expertd_engine.model.pathfinder import Pathfinder
from expertd_engine.model.pregate import Pregate, build_pregate
from expertd_engine.model.step_rows import Span
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from expertd_engine.step_plan import Chunk, StepPlan
from golden.tolerances import PREGATED_LOGPROBS
from refactor.tiny import HEADS, INDEX, make_pregated
from support.builders_core import make_sequence
from support.engine import Generated, generate, running_engine
from support.kernels import native_pool
from support.tiny_mixtral import make_mixtral

CONTEXT = 128
BLOCK = 16
PREFIXES = {True: 1000, False: 200}
"""With native kernels, and without, where each takes milliseconds."""
SHAPES = {"index": INDEX, "heads": HEADS}
ANSWERS = Sampling(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint and store of each kind, as `KIND` and `KIND-store`."""
    folder = tmp_path_factory.mktemp("pregated")
    for kind, shape in SHAPES.items():
        make_pregated(folder / kind, shape)
        prepare(folder / kind, folder / f"{kind}-store", "float32")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Pool | None]:
    if request.param == "torch":
        yield None
        return
    with native_pool(2) as pool:
        yield pool


def prompts_of(count: int, longest: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(256) for _ in range(chance.randint(1, longest))] for _ in range(count)]


# ---------------------------------------------------------------- the router alone


def route(pregate: Pregate, tokens: list[int], cuts: list[int], storage: KVStorage, first: int) -> torch.Tensor:
    """Experts `[heads, T, K]` of tokens that come in pieces."""
    blocks = list(range(first, first + CONTEXT // BLOCK))
    pieces = [pregate.route(tokens[a:b], range(a, b), [Span(0, a, b - a, blocks)], storage) for a, b in pairwise(cuts)]
    return pregate.known(pieces).tensors[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_pieces_are_routed_as_the_whole_for_a_thousand_prefixes(
    kind: str, stores: dict[str, Path], kernels: Pool | None
) -> None:
    loaded = load_model(ExpertStore.open(stores[f"{kind}-store"]), kernels)
    pregate, reason = build_pregate(loaded, CONTEXT)
    assert reason == (None if kernels else "there are no native kernels")
    model: Any = AutoModelForCausalLM.from_pretrained(stores[kind], dtype=torch.float32).eval()
    storage = KVStorage([pregate.kv_shape], 1 + 2 * CONTEXT // BLOCK, BLOCK, torch.float32)
    chance = random.Random(7)
    for tokens in prompts_of(PREFIXES[kernels is not None] // 20, CONTEXT, 3):
        whole = route(pregate, tokens, [0, len(tokens)], storage, 1)
        with torch.inference_mode():
            model(torch.tensor([tokens]))
        assert torch.equal(whole, model.routes.index)
        for _ in range(20):
            length = chance.randint(1, len(tokens))
            cuts = sorted({0, length, *(chance.randint(0, length) for _ in range(3))})
            pieces = route(pregate, tokens[:length], cuts, storage, 1 + CONTEXT // BLOCK)
            assert torch.equal(pieces, whole[:, :length])


@pytest.mark.parametrize("kind", SHAPES)
def test_batches_that_begin_and_go_on_are_routed_as_the_whole(
    kind: str, stores: dict[str, Path], kernels: Pool | None
) -> None:
    """Three sequences, token by token after their first ones."""
    pregate, _ = build_pregate(load_model(ExpertStore.open(stores[f"{kind}-store"]), kernels), CONTEXT)
    size = CONTEXT // BLOCK
    storage = KVStorage([pregate.kv_shape], 1 + 3 * size, BLOCK, torch.float32)
    sequences = [[7 * i % 250 + n for i in range(60)] for n in range(3)]
    whole = [route(pregate, tokens, [0, 60], storage, 1) for tokens in sequences]
    tables = [list(range(1 + n * size, 1 + (n + 1) * size)) for n in range(3)]
    starts = [5, 20, 16]
    for tokens, start, table in zip(sequences, starts, tables, strict=True):
        route(pregate, tokens, [0, start], storage, table[0])
    spans = [Span(n, start, 1, table) for n, (start, table) in enumerate(zip(starts, tables, strict=True))]
    begun = pregate.begin([sequences[n][starts[n]] for n in range(3)], starts, spans, storage)
    for step in range(40):
        if step:
            begun.again([sequences[n][starts[n] + step] for n in range(3)])
        chosen = pregate.known([begun.finish()]).tensors[0]
        for n in range(3):
            assert torch.equal(chosen[:, n], whole[n][:, starts[n] + step])


def test_blocks_that_were_given_up_are_not_gone_on_with(stores: dict[str, Path], kernels: Pool | None) -> None:
    """A sequence alone, preempted while a token of it is routed, and back in other blocks before the next."""
    pregate, _ = build_pregate(load_model(ExpertStore.open(stores["index-store"]), kernels), CONTEXT)
    storage = KVStorage([pregate.kv_shape], 5, BLOCK, torch.float32, spare_blocks=1)
    pathfinder = Pathfinder(pregate, storage, 64)
    sequence = make_sequence(prompt=range(20), max_tokens=9, ignore_eos=True)

    def step(token_id: int) -> None:
        chunk = Chunk(sequence, sequence.num_computed_tokens, sequence.num_uncomputed_tokens, True)
        pathfinder.for_step(StepPlan(0, "exact", (chunk,), ()))
        sequence.advance(chunk.num_tokens)
        sequence.append(token_id)
        pathfinder.foresee([sequence])

    pathfinder.foresee([sequence])
    sequence.admit([1, 2])
    step(7)
    sequence.preempt()
    sequence.admit([3, 4])
    step(9)
    written = storage.keys[0][1:3].clone()
    step(11)
    assert sequence.paths is not None and len(sequence.paths) == 23
    assert torch.equal(storage.keys[0][1:3], written)
    tokens = [*range(20), 7, 9, 11]
    whole = route(pregate, tokens, [0, 23], KVStorage([pregate.kv_shape], 9, BLOCK, torch.float32), 1)
    assert torch.equal(pregate.known([sequence.paths.routes(0, 23)]).tensors[0], whole)


def test_what_fails_beside_the_caller_is_told_and_what_nobody_waits_for_ends(stores: dict[str, Path]) -> None:
    with native_pool(1) as pool:
        threads = len(os.listdir("/proc/self/task"))
        loaded = load_model(ExpertStore.open(stores["index-store"]), pool)
        pregate, _ = build_pregate(loaded, CONTEXT)
        storage = KVStorage([pregate.kv_shape], 3, BLOCK, torch.float32)
        begun = pregate.begin([loaded.vocab_size], [0], [Span(0, 0, 1, [1])], storage)
        with pytest.raises(ValueError, match=rf"ids\[0\] is {loaded.vocab_size}; the matrix has"):
            begun.finish()
        begun = pregate.begin([255], [0], [Span(0, 0, 1, [1])], storage)
        begun.finish()
        begun.again([254])
        del pregate, begun
        gc.collect()
        assert len(os.listdir("/proc/self/task")) == threads


def test_a_token_that_the_model_lacks_is_refused(stores: dict[str, Path]) -> None:
    with native_pool(1) as pool:
        loaded = load_model(ExpertStore.open(stores["index-store"]), pool)
        pregate, _ = build_pregate(loaded, CONTEXT)
        storage = KVStorage([pregate.kv_shape], 3, BLOCK, torch.float32)
        with pytest.raises(ValueError, match=rf"ids\[1\] is {loaded.vocab_size}; the matrix has"):
            pregate.route([255, loaded.vocab_size], [0, 1], [Span(0, 0, 2, [1])], storage)
        with pytest.raises(ValueError, match=f"position {CONTEXT} is not in the table of {CONTEXT}"):
            pregate.route([1], [CONTEXT], [Span(0, CONTEXT, 1, [1] * 9)], storage)


# ---------------------------------------------------------------- in the engine


class Watch:
    """Notes what every step was told of its rows' experts, and what sequences knew before."""

    def __init__(self, engine: Engine) -> None:
        assert engine.runner.pathfinder is not None
        self.routes: dict[int, dict[int, list[list[int]]]] = {}
        """By sequence and position: experts, head by head."""
        self.known_ahead = self.preempted = self.cut = self.cached = 0
        self._for_step = engine.runner.pathfinder.for_step
        engine.runner.pathfinder.for_step = self.for_step  # type: ignore[method-assign]  # to look on

    def for_step(self, plan: StepPlan) -> Any:
        self.preempted += len(plan.preempted)
        for chunk in plan.chunks:
            paths = chunk.sequence.paths
            assert paths is not None and len(paths) >= chunk.stop
            self.known_ahead += chunk.num_tokens
            self.cut += chunk.is_prefill and chunk.stop < chunk.sequence.prefill_end
            self.cached += chunk.sequence.stats.cached_tokens > 0
        known = self._for_step(plan)
        chosen, row = known.tensors[0], 0
        for chunk in plan.chunks:
            of = self.routes.setdefault(chunk.sequence.sequence_id, {})
            for position in range(chunk.start, chunk.stop):
                experts = chosen[:, row].tolist()
                assert of.setdefault(position, experts) == experts
                row += 1
        return known


@pytest.mark.parametrize("kind", SHAPES)
def test_every_route_in_the_engine_is_the_whole_models(kind: str, stores: dict[str, Path]) -> None:
    """With prompts in pieces of seven, blocks for a few sequences only, and prompts that begin alike."""
    model: Any = AutoModelForCausalLM.from_pretrained(stores[kind], dtype=torch.float32).eval()
    beginning = prompts_of(1, 1, 9)[0] * 40
    prompts = [*prompts_of(8, 60, 5), *([*beginning, i] for i in range(4))]
    with running_engine(
        stores[f"{kind}-store"], max_step_tokens=7, max_sequences=6, max_model_len=CONTEXT, kv_budget="256KiB"
    ) as engine:
        watch = Watch(engine)
        answers = generate(engine, prompts, ANSWERS)
        again = generate(engine, prompts[:3] + prompts[-2:], ANSWERS, first_id=100)
    assert watch.preempted and watch.cut and watch.cached and watch.known_ahead
    assert [a.token_ids for a in again] == [answers[i].token_ids for i in (0, 1, 2, 10, 11)]
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        with torch.inference_mode():
            model(torch.tensor([prompt + answer.token_ids]))
        for position, experts in watch.routes[number].items():
            assert model.routes.index[:, position].tolist() == experts, (number, position)


@pytest.mark.parametrize("kind", SHAPES)
def test_answers_are_plain_transformers_own(kind: str, stores: dict[str, Path]) -> None:
    prompts = prompts_of(6, 50, 11)
    model: Any = AutoModelForCausalLM.from_pretrained(stores[kind], dtype=torch.float32).eval()
    with running_engine(stores[f"{kind}-store"], max_model_len=CONTEXT) as engine:
        assert engine.info.lookahead == "exact"
        answers = generate(engine, prompts, ANSWERS)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.token_ids])
        with torch.inference_mode():
            scores = model(ids).logits[0].log_softmax(-1)
        expected = scores[len(prompt) - 1 : -1]
        assert expected.argmax(-1).tolist() == answer.token_ids
        ours = torch.tensor([entry.logprob for output in answer.outputs for entry in output.logprobs or []])
        theirs = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert float((ours - theirs).abs().max()) <= PREGATED_LOGPROBS.allowed


def bits_of(answers: list[Generated]) -> list[list[tuple[int, float]]]:
    return [
        [(entry.token_id, entry.logprob) for output in answer.outputs for entry in output.logprobs or []]
        for answer in answers
    ]


def test_no_budget_policy_prefetch_or_batching_changes_a_bit(stores: dict[str, Path]) -> None:
    prompts = prompts_of(7, 40, 13)
    seen = []
    for options in (
        {"expert_budget": "100%"},
        {"expert_budget": "40%", "prefetch": False, "expert_policy": "lru"},
        {"expert_budget": "40%", "batching": "expert-aware", "max_step_tokens": 3},
        {"expert_budget": "30%", "batching": "prefill-first", "max_step_tokens": 16},
    ):
        with running_engine(stores["index-store"], max_model_len=CONTEXT, **options) as engine:
            seen.append(bits_of(generate(engine, prompts, ANSWERS)))
    assert all(one == seen[0] for one in seen)


def test_what_is_known_ahead_is_loaded_ahead(stores: dict[str, Path]) -> None:
    """At a budget where layers push each other out, prefetch finds in time what demand alone would wait for."""
    met = {}
    for prefetch in (True, False):
        with running_engine(
            stores["index-store"], max_model_len=CONTEXT, expert_budget="40%", prefetch=prefetch
        ) as engine:
            generate(engine, prompts_of(4, 20, 17), ANSWERS)
            met[prefetch] = engine.cache.ledger.counters
            engine.cache.ledger.check()
    assert sum(met[False].misses) > 0 and not sum(met[False].late)
    assert sum(met[True].misses) < sum(met[False].misses) / 2
    assert met[True].prefetch_bytes > 0


def test_batching_by_experts_is_refused_where_they_are_not_known(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "model")
    prepare(tmp_path / "model", tmp_path / "store", "float32")
    with (
        pytest.raises(ConfigError, match="expert-aware is not allowed for this model"),
        running_engine(tmp_path / "store", max_model_len=CONTEXT, batching="expert-aware"),
    ):
        pass


def test_quantised_stores_keep_the_router_as_it_is(stores: dict[str, Path], tmp_path: Path) -> None:
    """All else in int8: the same tokens are routed to the same experts."""
    prepare(stores["index"], tmp_path / "int8", "int8", "int8")
    opened = ExpertStore.open(tmp_path / "int8")
    assert any(name.endswith("q_proj.weight") for name in opened.index.quantised)
    assert not [name for name in opened.index.quantised if name.startswith("router.")]
    with running_engine(tmp_path / "int8", max_model_len=CONTEXT) as engine:
        assert (engine.info.step_path, engine.info.fallbacks) == ("native", []) or why_missing()
        generate(engine, prompts_of(2, 40, 19), ANSWERS)
