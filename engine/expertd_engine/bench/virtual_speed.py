"""`expertd bench virtual`: a token in virtual mode beside one of a model that has no more experts than a layer holds.

Both engines live in this process, all cores theirs in turns of some tokens, so that what else the box does meets both;
the first token of a turn, which finds the other's bytes in the caches, is not timed. The other model is the same store
cut to its first N (of one index: its first N paths), all of them resident. Text is continued by sampling, so that
routes are those of text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

from expertd_engine.bench.cut_store import cut_store
from expertd_engine.bench.perplexity import held_out
from expertd_engine.bench.report import finish, number, percent, spread
from expertd_engine.bench.stats import median_interval, percentile, ratio_interval
from expertd_engine.bench.text_decoder import Decoder, Timed, longest, take_turns
from expertd_engine.config import Config, Device, Size
from expertd_engine.experts.device_slab import plan_chunks
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex

HEADER = ("run", "ms/token", "95 %", "p95 ms", "stall ms/token", "substituted", "expert MB/token")


def virtual_speed(
    path: Path, slots: int, *, pairs: int = 15, tokens: int = 48, threads: int | None = None, io_threads: int = 2,
    device: Device = "cpu",
) -> str:  # fmt: skip
    """Measure the store at `path` with `slots` experts held in each layer: the report.

    Raises UsageError for a number of slots that a layer cannot have, and what starting an engine raises.
    """
    store = ExpertStore.open(path)
    prompts = held_out(Tokenizer.from_file(str(path / "tokenizer.json")), 16)
    alone, whole, beside = (Timed(name) for name in ("virtual", f"a model of {slots} experts", "virtual, exact beside"))
    with TemporaryDirectory() as folder:
        cut = cut_store(store, slots, Path(folder) / "cut")
        context = longest(tokens)
        common = Config(
            model=str(store.path), prefix_cache=False, warm_restart=False, max_model_len=context, max_sequences=2,
            threads=threads, io_threads=io_threads, device=device,
        )  # fmt: skip
        ours = Decoder(store, _holding(common, store.index, slots), prompts)
        theirs = Decoder(cut, replace(common, model=str(cut.path)), prompts)
        for pair in range(pairs):
            take_turns(pair, tokens, (theirs, "exact", whole), (ours, "virtual", alone))
        for _ in range(pairs):
            ours.window(["virtual", "exact"], tokens, beside)
        ours.close()
        theirs.close()
    return _report(store, slots, pairs, tokens, (alone, whole, beside))


def _holding(config: Config, index: StoreIndex, slots: int) -> Config:
    """With room for so many in each layer, and for two to load through."""
    records = [index.record_bytes(layer) for layer in range(len(index.layers))]
    budget = slots * sum(records) + 2 * max(records)
    if config.device == "cuda":
        chunks = plan_chunks(max(records), sum(layer.num_experts for layer in index.layers))
        budget = chunks.budget_of(slots * len(records) + 2)
    return replace(config, expert_budget=Size(bytes=budget), virtual_share=1.0, virtual_slots=slots)


def _report(store: ExpertStore, slots: int, pairs: int, tokens: int, runs: tuple[Timed, Timed, Timed]) -> str:
    alone, whole, _ = runs
    record_bytes = store.index.expert_bytes_total() / sum(layer.num_experts for layer in store.index.layers)
    ratio = ratio_interval(alone.means_s, whole.means_s)
    values = {
        "command": "virtual", "model": store.index.name, "slots": slots, "pairs": pairs, "tokens": tokens,
        "ratio": ratio.median, "ratio_interval": ratio.as_json(),
        "runs": {run.name: _values(run, record_bytes) for run in runs},
    }  # fmt: skip
    note = f"virtual over cut: {ratio.median:.3f} × (95 %: {spread(ratio.low, ratio.high, 3)})"
    title = f"{store.index.name}: {slots} slots a layer, {pairs} pairs of {tokens} tokens, one stream"
    return finish(title, HEADER, [_row(run, record_bytes) for run in runs], [note], values)


def _values(run: Timed, record_bytes: float) -> dict[str, float]:
    """`record_bytes`: of an expert, on average. Bytes of experts are those of all streams' steps."""
    return {
        "ms_per_token": 1e3 * median_interval(run.means_s).median,
        "p95_ms": 1e3 * percentile(run.gaps_s, 0.95),
        "stall_s": run.stall_s,
        "substituted": run.substituted / max(1, run.choices),
        "expert_bytes_per_token": run.lookups * record_bytes / len(run.gaps_s),
    }


def _row(run: Timed, record_bytes: float) -> list[str]:
    interval, values = median_interval(run.means_s), _values(run, record_bytes)
    return [
        run.name,
        number(values["ms_per_token"]),
        spread(1e3 * interval.low, 1e3 * interval.high),
        number(values["p95_ms"]),
        number(1e3 * run.stall_s / len(run.gaps_s), 3),
        percent(values["substituted"]),
        number(values["expert_bytes_per_token"] / 1e6, 1),
    ]
