"""Every family from checkpoint to tokens: `prepare`, then a real engine, against plain transformers with eager layers.

Prompts are cut into chunks, share steps with others, and run past sliding windows and the attention's key padding.
Compared are log-probabilities of the whole vocabulary, which are the logits but for one constant a row, at every
position: of the prompt, and of the tokens that the engine generated.
"""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store import ExpertStore, identify
from expertd_engine.experts.store_format import INDEX_NAME, RECORDS_NAME
from expertd_engine.families import DTYPES, find_experts
from expertd_engine.messages import Sampling
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from golden.tolerances import BF16_LOGITS, BF16_OVER_TRANSFORMERS, FLOAT32_LOGITS, REQUIRED_FLOAT32
from support.engine import Generated, generate, running_engine
from support.tiny_checkpoints import make_checkpoint
from support.tiny_families import TINY_FAMILIES, VOCAB_SIZE

PROMPT_LENGTHS = (141, 3, 9, 17, 26, 12, 7, 5)
STEP_TOKENS = 24
NEW_TOKENS = 5
SAMPLING = Sampling(
    max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE
)


@dataclass(frozen=True)
class Run:
    """One sequence as the engine computed it: the prompt, the tokens chosen, and `[tokens - 1, V]` log-probabilities
    of every token but the first."""

    prompt: list[int]
    chosen: list[int]
    logprobs: Tensor


@dataclass(frozen=True)
class Served:
    """A family's checkpoint, and what the engine made of it by `(budget, batch size)`."""

    family: str
    checkpoint: Path
    store: Path
    runs: dict[tuple[str, int], list[Run]]
    numerics: str


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@contextmanager
def _engine(store: Path, budget: str) -> Iterator[Engine]:
    """An engine at the smallest expert budget that works, or with room for all experts."""
    smallest = 2 * max(layout.bytes for layout in ExpertStore.open(store).index.layouts)
    size = {"minimum": str(smallest), "all": "100%"}[budget]
    with running_engine(
        store, expert_budget=size, max_step_tokens=STEP_TOKENS, max_sequences=len(PROMPT_LENGTHS), threads=1
    ) as engine:
        assert (budget == "minimum") == (engine.info.expert_budget_bytes == engine.info.minimum_expert_budget_bytes)
        yield engine
        assert engine.cache.ledger.peak_bytes <= engine.info.expert_budget_bytes


def _run(engine: Engine, prompts: list[list[int]]) -> list[Run]:
    results = generate(engine, prompts, SAMPLING)
    return [Run(prompt, one.token_ids, _logprobs(one)) for prompt, one in zip(prompts, results, strict=True)]


def _logprobs(generated: Generated) -> Tensor:
    told = [entry for output in generated.outputs for entry in output.prompt_logprobs or ()]
    told += [entry for output in generated.outputs for entry in output.logprobs or ()]
    rows = torch.empty(len(told) - 1, VOCAB_SIZE)
    for row, entry in zip(rows, told[1:], strict=True):
        assert entry is not None and len(entry.top) == VOCAB_SIZE
        row[[top.token_id for top in entry.top]] = torch.tensor([top.logprob for top in entry.top])
    return rows


def _serve(family: str, folder: Path, dtype: str) -> Served:
    checkpoint, store = folder / "checkpoint", folder / "store"
    make_checkpoint(family, checkpoint, seed=4, dtype=DTYPES[dtype])
    prepare(checkpoint, store, dtype)
    runs = {}
    for budget in ("minimum", "all"):
        with _engine(store, budget) as engine:
            for size in (1, len(PROMPT_LENGTHS)):
                runs[budget, size] = _run(engine, _prompts()[:size])
            numerics = engine.info.numerics
    return Served(family, checkpoint, store, runs, numerics)


def _reference(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def _expected(model: PreTrainedModel, run: Run) -> Tensor:
    """What plain transformers says of the same tokens, each sequence alone: as `Run.logprobs`."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([[*run.prompt, *run.chosen[:-1]]]), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def _worst(model: PreTrainedModel, runs: Sequence[Run]) -> float:
    return max(float((run.logprobs - _expected(model, run)).abs().max()) for run in runs)


@pytest.fixture(scope="module", params=sorted(TINY_FAMILIES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return _serve(request.param, tmp_path_factory.mktemp(request.param), "float32")


@pytest.fixture(scope="module", params=sorted(BF16_LOGITS))
def served_bf16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return _serve(request.param, tmp_path_factory.mktemp(request.param), "bf16")


@pytest.fixture(scope="module")
def reference(served: Served) -> PreTrainedModel:
    return _reference(served.checkpoint, torch.float32)


def test_float32_logits_are_those_of_transformers(served: Served, reference: PreTrainedModel) -> None:
    measured = max(_worst(reference, runs) for runs in served.runs.values())
    assert measured <= FLOAT32_LOGITS[served.family].allowed <= REQUIRED_FLOAT32


def test_greedy_tokens_are_those_of_transformers(served: Served, reference: PreTrainedModel) -> None:
    for runs in served.runs.values():
        for run in runs:
            assert len(run.chosen) == NEW_TOKENS
            assert run.chosen == _expected(reference, run)[-NEW_TOKENS:].argmax(-1).tolist()


def test_bits_depend_on_the_sequence_alone(served: Served) -> None:
    assert served.numerics == "invariant"
    assert all(torch.equal(one, other) for one, other in _same_by_law_7(served))


def test_bits_depend_on_the_sequence_alone_in_bf16(served_bf16: Served) -> None:
    assert served_bf16.numerics == "invariant"
    assert all(torch.equal(one, other) for one, other in _same_by_law_7(served_bf16))


def _same_by_law_7(served: Served) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities of sequences at another budget, and with other batch mates and chunk boundaries."""
    runs, size = served.runs, len(PROMPT_LENGTHS)
    budgets = list(zip(runs["minimum", size], runs["all", size], strict=True))
    mates = [(runs[budget, 1][0], runs[budget, size][0]) for budget in ("minimum", "all")]
    return [(one.logprobs, other.logprobs) for one, other in budgets + mates]


def test_a_zeroed_expert_is_missed(served: Served, tmp_path: Path) -> None:
    """Its record is that expert and no other: zeroing it there, or in transformers' model, gives the same logits."""
    model, before = _reference(served.checkpoint, torch.float32), served.runs["all", 1][0]
    name, module = find_experts(model)[-1]
    expert = _most_chosen(model, module, before.prompt)
    with torch.inference_mode():
        for parameter in module.parameters(recurse=False):
            parameter[expert] = 0
    _copy_zeroing(ExpertStore.open(served.store), tmp_path / "store", name, expert)
    with _engine(tmp_path / "store", "all") as engine:
        (after,) = _run(engine, [before.prompt])
    told = len(before.prompt) - 1
    assert float((after.logprobs[:told] - before.logprobs[:told]).abs().max()) > 10 * REQUIRED_FLOAT32
    assert _worst(model, [after]) <= FLOAT32_LOGITS[served.family].allowed


def _most_chosen(model: PreTrainedModel, experts: torch.nn.Module, prompt: list[int]) -> int:
    counts: Counter[int] = Counter()
    hook = experts.register_forward_pre_hook(lambda module, arguments: counts.update(arguments[1].flatten().tolist()))
    model(torch.tensor([prompt]), use_cache=False)
    hook.remove()
    return counts.most_common(1)[0][0]


def _copy_zeroing(store: ExpertStore, copy: Path, module: str, expert: int) -> None:
    """A copy of the store that is sound by its checksums, but for one record of zeros."""
    shutil.copytree(store.path, copy)
    index = store.index
    layer = [entry.module for entry in index.layers].index(module)
    zeros = bytes(index.record_bytes(layer))
    with (copy / RECORDS_NAME).open("r+b") as file:
        file.seek(store.index.record_offset(ExpertId(layer, expert)))
        file.write(zeros)
    index.layers[layer].crc32[expert] = zlib.crc32(zeros)
    index = msgspec.structs.replace(index, store_id=identify(index))
    (copy / INDEX_NAME).write_bytes(msgspec.json.encode(index))


def test_bf16_logits_are_as_near_as_those_of_transformers(served_bf16: Served) -> None:
    """Near what the same weights give in float32. Rounding turns a near tie of experts the other way at a few
    positions, in transformers as much as here: so compared is the median over positions of the largest error."""
    exact, theirs = (_reference(served_bf16.checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours, reference = [], []
    for run in served_bf16.runs["all", len(PROMPT_LENGTHS)]:
        expected = _expected(exact, run)
        ours.append((run.logprobs - expected).abs().amax(-1))
        reference.append((_expected(theirs, run) - expected).abs().amax(-1))
    error, usual = (float(torch.cat(errors).median()) for errors in (ours, reference))
    assert error <= BF16_LOGITS[served_bf16.family].allowed
    assert error <= BF16_OVER_TRANSFORMERS.allowed * usual
