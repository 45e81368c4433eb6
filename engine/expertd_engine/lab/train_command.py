"""`expertd train-predictor`: learns a store's routes from traces with hidden states, and judges what was learned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from expertd_engine.bench.report import table
from expertd_engine.config import Config
from expertd_engine.console import progress_bar, run_command
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.lab.predictor_file import write_predictor
from expertd_engine.lab.recall import MORE, Recall, recalls
from expertd_engine.lab.trace import Trace, read_traces
from expertd_engine.lab.training import Plan, train
from expertd_engine.model.gates import Gate, NotLinear, find_gates
from expertd_engine.model.loader import load_model
from expertd_engine.sources import resolve


def divide(trace: Trace, held: float) -> tuple[Trace, Trace]:
    """Learn from the first, judge by the rest: the last `held` of all sequences."""
    streams = np.unique(trace.streams)
    first = streams[min(len(streams) - 1, round((1 - held) * len(streams)))] if held else streams[-1] + 1
    return trace.rows(trace.streams < first), trace.rows(trace.streams >= first)


def describe(found: Sequence[Recall], k: int) -> str:
    """Recall by lead, over all layers."""
    leads = range(1, found[0].at_k.shape[1] + 1)
    rows = [
        [f"{one.name} @{at}", *(f"{value:.3f}" for value in values.mean(axis=0))]
        for one in found
        for at, values in ((k, one.at_k), (k + MORE, one.at_more))
    ]
    return table(["recall", *(f"{lead} ahead" for lead in leads)], rows)


def values_of(found: Sequence[Recall], k: int) -> dict[str, Any]:
    """By layer and lead, for programs."""
    return {one.name: {f"@{k}": one.at_k.tolist(), f"@{k + MORE}": one.at_more.tolist()} for one in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="expertd train-predictor",
        description="Learn to foresee a store's routes. Prints recall by lead, then one JSON object on the last line.",
    )
    parser.add_argument("model", metavar="MODEL", help="store, or whatever `expertd serve` takes")
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="of `expertd trace record --hidden`")
    parser.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    parser.add_argument("--held", type=float, default=0.2, metavar="X", help="of the text, to judge by (default: 0.2)")
    parser.add_argument("--leads", type=int, default=8, metavar="N", help="layers ahead (default: 8)")
    parser.add_argument("--rank", type=int, default=128, metavar="N", help="of each layer's map (default: 128)")
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="(default: 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: all cores)")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if not 0 <= options.held < 1:
        raise UsageError(f"--held {options.held} is not allowed: give 0 or more, and less than 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    with progress_bar() as progress:
        store = ExpertStore.open(resolve(options.model, options.cache_dir.expanduser(), progress=progress))
        trace = read_traces(options.traces, hidden=True).decoding()
        if trace.header.store_id != store.index.store_id:
            raise UsageError(f"the trace is of store {trace.header.store_id[:12]}, not of {store.path}")
        gates = gates_of(store)
        learn, judge = divide(trace, options.held)
        plan = Plan(options.leads, options.rank, options.epochs, options.seed)
        predictor = train(learn, gates, plan, progress)
        found = recalls(judge, gates, predictor, options.leads) if len(judge) else []
    print(write_predictor(store.path, predictor, store.index.store_id, {"tokens": len(learn)}))
    if found:
        print(f"\n{len(learn)} tokens learned, {len(judge)} judged by\n\n{describe(found, trace.header.top_k)}")
        print(msgspec.json.encode(values_of(found, trace.header.top_k)).decode())


def gates_of(store: ExpertStore) -> list[Gate] | None:
    """None where its routers are no matrices. Loads the model."""
    try:
        return find_gates(load_model(store).model, [layer.module for layer in store.index.layers])
    except NotLinear:
        return None
