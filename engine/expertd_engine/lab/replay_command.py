"""`expertd replay`: a trace through every policy and budget, beside the clairvoyant bound; and what to serve with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from expertd_engine.bench.report import percent, table
from expertd_engine.config import Config, parse_size
from expertd_engine.console import progress_bar, run_command
from expertd_engine.errors import ConfigError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.lab.compare import Comparison, compare, recommend
from expertd_engine.lab.predictor_file import Predictor, has_predictor, read_predictor
from expertd_engine.lab.recommendation import write_recommendation
from expertd_engine.lab.trace import Trace, TraceHeader, read_part, read_traces
from expertd_engine.lab.train_command import gates_of
from expertd_engine.model.loader import is_pregated
from expertd_engine.model.predictor_build import is_trivial
from expertd_engine.pictures import new_figure, save
from expertd_engine.sources import resolve


def slots_of(budget: str, header: TraceHeader) -> int:
    """Whole slots of a budget: bytes, a share of all experts such as 25%, or N×k, N times top-k a layer."""
    if budget.endswith("k") and budget[:-1].replace(".", "", 1).isdigit():
        return round(float(budget[:-1]) * header.top_k * len(header.experts))
    total = sum(n * size for n, size in zip(header.experts, header.record_bytes, strict=True))
    try:
        slots = parse_size(budget, share_allowed=True).resolve(total) // max(header.record_bytes)
    except ConfigError as error:
        raise UsageError(f"budget {budget!r} is not allowed: give 2k for twice top-k a layer, or {error}") from None
    if slots < 2:
        raise UsageError(f"budget {budget!r} is not allowed: it holds {slots} experts, give room for 2")
    return slots


def describe(comparison: Comparison, names: dict[int, str], best: str) -> str:
    """The table: hit rates, and in brackets how much of the way from LRU to the bound."""
    first = next(iter(comparison.met.values()))
    rows = []
    for policy in first:
        cells = [policy + (" *" if policy == best else "")]
        for slots, met in comparison.met.items():
            cells += [f"{100 * met[policy].hit_rate:.2f} %", percent(comparison.closed(slots, policy))]
        rows.append(cells)
    header = ["policy", *(cell for slots in comparison.met for cell in (f"hits at {names[slots]}", "of the gap"))]
    title = f"{comparison.tokens} tokens, {comparison.lookups} lookups; * is recommended"
    return "\n".join([title, "", table(header, rows)])


def values_of(comparison: Comparison, names: dict[int, str], best: str) -> dict[str, Any]:
    """For programs."""
    met = {
        names[slots]: {
            policy: {"hit_rate": one.hit_rate, "misses": one.misses, "closed": comparison.closed(slots, policy)}
            for policy, one in row.items()
        }
        for slots, row in comparison.met.items()
    }
    return {"tokens": comparison.tokens, "lookups": comparison.lookups, "recommended": best, "budgets": met}


def draw(comparison: Comparison, path: Path, total: int) -> None:
    """Budget against misses. Raises UsageError without matplotlib."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    shares = sorted(comparison.met)
    for policy in comparison.met[shares[0]]:
        misses = [1 - comparison.met[slots][policy].hit_rate for slots in shares]
        axes.plot([slots / total for slots in shares], misses, marker="o", label=policy)
    axes.set(xlabel="of all experts resident", ylabel="lookups that miss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd replay`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="expertd replay",
        description="Replay traces through policies and budgets. Prints a table, then one JSON object.",
    )
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="folders or parts")
    parser.add_argument("--store", metavar="MODEL", help="whose predictor is judged too, and who is recommended to")
    parser.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    parser.add_argument(
        "--budgets", default="2k,4k", metavar="B,…", help="2k is twice top-k a layer; or sizes (default: 2k,4k)"
    )
    parser.add_argument("--warm", type=float, default=0.1, metavar="X", help="of the trace, not counted (default: 0.1)")
    parser.add_argument("--recommend", action="store_true", help="have `serve --expert-policy auto` do as is found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw budget against misses")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if not 0 <= options.warm < 1:
        raise UsageError(f"--warm {options.warm} is not allowed: give 0 or more, and less than 1")
    if options.recommend and options.store is None:
        raise UsageError("--recommend needs --store: the recommendation is kept beside it")
    with progress_bar() as progress:
        store = None
        if options.store is not None:
            store = ExpertStore.open(resolve(options.store, options.cache_dir.expanduser(), progress=progress))
            if options.recommend:
                refuse_what_is_foreseen(store.index)
        trace, predictor = _read(options.traces, store)
        names = {slots_of(budget, trace.header): budget for budget in options.budgets.split(",")}
        gates = gates_of(store) if store is not None and trace.hidden is not None else None
        comparison = compare(trace, list(names), predictor, gates, warm=options.warm, progress=progress)
    best = comparison.best()
    print(describe(comparison, names, best))
    if options.png is not None:
        draw(comparison, options.png, sum(trace.header.experts))
    if store is not None and options.recommend:
        print(f"\n{write_recommendation(store.path, recommend(comparison, store.index.store_id))}")
    line = msgspec.json.encode(values_of(comparison, names, best))
    if options.json is not None:
        options.json.write_bytes(line + b"\n")
    print(line.decode())


def refuse_what_is_foreseen(index: StoreIndex) -> None:
    """Raise UsageError for a model whose routes are known ahead: replays here know nothing of the future, and what wins
    among them is worse than what `auto` does there."""
    if is_pregated(index) or is_trivial(index):
        raise UsageError(
            f"--recommend is not allowed for {index.name}: its routes are known ahead, and next-use uses them"
        )


def _read(paths: Sequence[Path], store: ExpertStore | None) -> tuple[Trace, Predictor | None]:
    """The trace, with its hidden states where there is a store whose gates or predictor can be asked about them."""
    if store is None:
        return read_traces(paths), None
    first = next((part for path in paths for part in ([path] if path.is_file() else sorted(path.glob("*.npz")))), None)
    hidden = first is not None and read_part(first, hidden=True).hidden is not None
    trace = read_traces(paths, hidden=hidden)
    if trace.header.store_id != store.index.store_id:
        raise UsageError(f"the trace is of store {trace.header.store_id[:12]}, not of {store.path}")
    return trace, read_predictor(store.path, store.index.store_id) if has_predictor(store.path) else None
