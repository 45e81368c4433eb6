"""Law 7 end to end: budget, policy, prefetch, batch mates, chunks and preemption change time, never a bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertd_engine.convert import convert_blocks
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import RECORDS_NAME
from expertd_engine.messages import Sampling
from expertd_engine.model import native_model
from expertd_engine.model.native_model import NativeModel
from expertd_engine.model.native_run import LayerRun
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from support.engine import Generated, Logits, collect, generate, step, submit_of, without_trials
from support.engine import running_engine as running
from support.tiny_mixtral import make_llama, make_mixtral

FORMATS = ("bf16", "float32")
GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2)
SEEDED = Sampling(max_tokens=8, temperature=1.0, top_p=0.95, seed=1234, ignore_eos=True, logprobs=2)


def running_engine(store: Path, **options: Any) -> AbstractContextManager[Engine]:
    return running(store, **{"threads": 1, "max_model_len": 128, **options})


def prompt(number: int, length: int) -> list[int]:
    return [(37 * number + 11 * i) % 250 for i in range(length)]


MINE = prompt(0, 39)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By (`block` or `mixtral`, format)."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "llama", hidden_size=96)
    convert_blocks(folder / "llama", folder / "block", 4, "float32")
    make_mixtral(folder / "mixtral", intermediate_size=40)
    made = {}
    for kind in ("block", "mixtral"):
        for experts_format in FORMATS:
            made[kind, experts_format] = folder / f"{kind}-{experts_format}"
            prepare(folder / kind, made[kind, experts_format], experts_format)
    return made


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    without_trials(monkeypatch)


def check_idle(engine: Engine) -> None:
    """No lease, no block and no byte is left over."""
    engine.cache.pump()
    engine.cache.ledger.check()
    engine.core.scheduler.check()
    assert engine.pool.used_blocks == 0 and not engine.cache._leases
    assert engine.cache.ledger.peak_bytes <= engine.info.expert_budget_bytes


def tokens_and_logprobs(generated: Generated) -> tuple[list[int], list[Any]]:
    entries = [entry for output in generated.outputs for entry in output.logprobs or ()]
    assert generated.finished is not None and generated.finished.reason == "length"
    return generated.token_ids, entries


@pytest.mark.parametrize("experts_format", FORMATS)
@pytest.mark.parametrize("kind", ["block", "mixtral"])
def test_budget_policy_and_prefetch_change_no_bit(
    stores: dict[tuple[str, str], Path], kind: str, experts_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores[kind, experts_format]
    index = ExpertStore.open(store).index
    minimum = str(2 * index.record_bytes(0))
    prompts = [MINE, prompt(1, 7), prompt(2, 21)]
    expected: list[torch.Tensor] | None = None
    hits = set()
    for budget in ("100%", "50%", "25%", minimum):
        for policy in ("lru", "lfu", "next-use"):
            for prefetch in (True, False):
                with monkeypatch.context() as patch:
                    logits = Logits(patch)
                    with running_engine(
                        store, expert_budget=budget, expert_policy=policy, prefetch=prefetch, max_step_tokens=24,
                        max_model_len=64,
                    ) as engine:  # fmt: skip
                        logits.steps.clear()
                        generate(engine, prompts, GREEDY)
                        check_idle(engine)
                        hits.add(sum(engine.cache.ledger.counters.hits))
                expected = expected or logits.steps
                assert len(logits.steps) == len(expected) >= GREEDY.max_tokens
                assert all(map(torch.equal, logits.steps, expected)), f"{budget}, {policy}, prefetch {prefetch}"
    assert len(hits) > 4, "the settings made no difference to the experts either: nothing was tried"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("experts_format", FORMATS)
@pytest.mark.parametrize("kind", ["block", "mixtral"])
def test_a_sequence_is_the_same_alone_and_in_any_batch(
    stores: dict[tuple[str, str], Path], kind: str, experts_format: str, sampling: Sampling
) -> None:
    expected = None
    for max_step_tokens in (512, 16):
        with running_engine(
            stores[kind, experts_format], expert_budget="50%", max_step_tokens=max_step_tokens
        ) as engine:
            assert engine.info.numerics == "invariant"
            for batch in (1, 2, 8, 32):
                others = [prompt(i, 3 + 5 * i % 29) for i in range(1, batch)]
                where = batch // 2
                results = generate(engine, [*others[:where], MINE, *others[where:]], sampling)
                mine = tokens_and_logprobs(results[where])
                expected = expected or mine
                assert mine == expected, f"{batch} at once, {max_step_tokens} tokens a step"
            check_idle(engine)


@pytest.mark.parametrize("experts_format", FORMATS)
def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(
    stores: dict[tuple[str, str], Path], experts_format: str
) -> None:
    store = stores["mixtral", experts_format]
    prompts = [prompt(i, 12 + i) for i in range(6)]
    sampling = [Sampling(max_tokens=40, seed=i, ignore_eos=True, logprobs=0) for i in range(6)]
    with running_engine(store, max_model_len=64) as roomy:
        expected = [tokens_and_logprobs(g) for g in generate(roomy, prompts, sampling)]
        assert roomy.core.scheduler.num_preemptions == 0
        tight_kv = str(5 * roomy.storage.block_bytes)
    with running_engine(store, max_model_len=64, kv_budget=tight_kv) as tight:
        results = generate(tight, prompts, sampling)
        assert tight.core.scheduler.num_preemptions > 0
        assert [tokens_and_logprobs(g) for g in results] == expected
        check_idle(tight)


@pytest.mark.parametrize("experts_format", FORMATS)
def test_prompt_logprobs_are_the_same_whole_and_in_chunks(
    stores: dict[tuple[str, str], Path], experts_format: str
) -> None:
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=3)
    results = []
    for max_step_tokens in (512, 16, 7):
        with running_engine(stores["mixtral", experts_format], max_step_tokens=max_step_tokens) as engine:
            mine, _ = generate(engine, [MINE, prompt(1, 30)], sampling)
        scored = [output.prompt_logprobs for output in mine.outputs if output.prompt_logprobs is not None]
        assert len(scored) == 1 and len(scored[0]) == len(MINE) and scored[0][0] is None
        assert [entry.token_id for entry in scored[0][1:] if entry] == MINE[1:]
        results.append(scored)
    assert results[0] == results[1] == results[2]


# ---------------------------------------------------------------- when something goes wrong


def test_a_record_that_cannot_be_read_ends_its_step_and_the_next_request_is_right(
    stores: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(stores["block", "bf16"], expert_budget="25%") as engine:
        (expected,) = generate(engine, [MINE], GREEDY)
        read = RecordFile.read_record

        def failing(self: RecordFile, expert: ExpertId, buffer: memoryview) -> None:
            if expert == ExpertId(1, 2):
                raise StoreError("torn")
            read(self, expert, buffer)

        with monkeypatch.context() as patch:
            patch.setattr(RecordFile, "read_record", failing)
            patch.setattr(RecordFile, "place_of", lambda self, expert: None)
            failed = generate(engine, [MINE, prompt(1, 5)], GREEDY, first_id=10)
        for one in failed:
            assert one.finished is not None and one.finished.reason == "error" and one.token_ids == []
            assert one.finished.error == "expert 2 of MoE layer 1 cannot be loaded: StoreError: torn"
        check_idle(engine)
        (again,) = generate(engine, [MINE], GREEDY, first_id=20)
        assert tokens_and_logprobs(again) == tokens_and_logprobs(expected)
        check_idle(engine)


def test_a_record_damaged_on_disk_is_named(
    stores: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store too large to be read whole at start: each record is checked when it is first read."""
    source = stores["mixtral", "bf16"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = ExpertStore.open(source).index.record_offset(ExpertId(2, 11)) + 100
    data = bytearray((tmp_path / RECORDS_NAME).read_bytes())
    data[place] ^= 1
    (tmp_path / RECORDS_NAME).write_bytes(data)
    with pytest.raises(StoreError, match=r"layer 2, expert 11\) of experts.bin is corrupted"), running_engine(tmp_path):
        pass
    monkeypatch.setattr("expertd_engine.startup_parts.VERIFY_AT_START_BYTES", 0)
    with running_engine(tmp_path, expert_budget="25%") as engine:
        (result,) = generate(engine, [prompt(0, 60)], GREEDY)
        assert result.finished is not None and result.finished.reason == "error"
        assert "layer 2, expert 11" in str(result.finished.error) and "corrupted" in str(result.finished.error)
        check_idle(engine)


def noting(function: Callable[..., int], results: list[int]) -> Callable[..., int]:
    """The function, whose results are also kept."""

    def noted(*args: Any) -> int:
        results.append(function(*args))
        return results[-1]

    return noted


class ByRow:
    """Generated routes: row r of a step goes to other experts in every layer, whoever it is and whatever it says."""

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts

    def step_routes(self, num_rows: int) -> NDArray[np.int64]:
        pairs = [[[(r + layer) % self._experts, (r + 2 * layer + 1) % self._experts] for layer in range(self._layers)]
                 for r in range(num_rows)]  # fmt: skip
        return np.sort([[(a, b) if a != b else (a, (a + 1) % self._experts) for a, b in row] for row in pairs], axis=-1)

    def route(self, layer: int, num_rows: int) -> NDArray[np.int64]:
        return self.step_routes(num_rows)[:, layer]


@pytest.mark.parametrize(("budget", "generated"), [("100%", False), ("50%", False), ("50%", True)])
def test_layers_that_run_on_give_the_bits_of_layers_that_are_asked(
    stores: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, budget: str, generated: bool
) -> None:
    """Decoding without coming back to Python between layers, and with; on the routers' choices or on generated ones."""
    prompts = [MINE, prompt(3, 9), prompt(4, 17)]
    results, lookups = [], []
    for may in (True, False):
        with monkeypatch.context() as patch, running_engine(stores["mixtral", "bf16"], expert_budget=budget) as engine:
            ran: list[int] = []
            patch.setattr(LayerRun, "forward", noting(LayerRun.forward, ran))
            if generated:
                counts = engine.cache.ledger.experts_per_layer
                engine.runner.routes = ByRow(len(counts), max(counts))
            if not may:
                patch.setattr(native_model, "may_run", lambda routes, rows: False)
            results.append([tokens_and_logprobs(one) for one in generate(engine, prompts, GREEDY)])
            lookups.append(engine.cache.ledger.counters.lookups())
            assert bool(ran) is may
            check_idle(engine)
    assert results[0] == results[1] and lookups[0] == lookups[1]


def test_memory_that_runs_out_ends_the_step_alone(
    stores: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(stores["block", "bf16"]) as engine:
        (expected,) = generate(engine, [MINE], GREEDY)
        with monkeypatch.context() as patch:

            def exhausted(*_: Any) -> torch.Tensor:
                return torch.empty(2**55, dtype=torch.uint8)

            patch.setattr(NativeModel, "begin", exhausted)
            (failed,) = generate(engine, [MINE], GREEDY, first_id=5)
        assert failed.finished is not None and failed.finished.reason == "error"
        check_idle(engine)
        (again,) = generate(engine, [MINE], GREEDY, first_id=9)
        assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_abort_between_steps_leaves_the_others_right(stores: dict[tuple[str, str], Path], steps: int) -> None:
    with running_engine(stores["mixtral", "bf16"], expert_budget="25%", max_step_tokens=16) as engine:
        (expected,) = generate(engine, [MINE], GREEDY)
        results = {1: Generated(), 2: Generated()}
        engine.core.submit(submit_of(1, MINE, GREEDY), 0.0)
        engine.core.submit(submit_of(2, prompt(3, 20), GREEDY), 0.0)
        for _ in range(steps):
            step(engine, results)
        engine.core.abort([2], 0.0)
        collect(engine, results)
        assert results[2].finished is not None and results[2].finished.reason == "abort"
        assert tokens_and_logprobs(results[1]) == tokens_and_logprobs(expected)
        check_idle(engine)
