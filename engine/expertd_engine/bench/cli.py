"""`expertd bench`: from flags to the subcommand called. Decides nothing; heavy imports come with the subcommand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from expertd_engine.bench.flags import parser
from expertd_engine.console import progress_bar, run_command
from expertd_engine.experts.store_format import TARGETS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; the report goes to standard output. Returns the exit code."""
    options = parser().parse_args(argv)
    return run_command(lambda: print(_RUNS[options.command](options)))


def _decode(options: argparse.Namespace) -> str:
    from expertd_engine.bench.options import read_options

    if options.device == "cuda":
        from expertd_engine.bench.device_decode import cells_of, device_decode

        cells = cells_of(options)
        return device_decode(read_options(options, _store(options)), cells)
    from expertd_engine.bench.decode import decode

    return decode(read_options(options, _store(options)))


def _prefill(options: argparse.Namespace) -> str:
    from expertd_engine.bench.options import read_options

    if options.device == "cuda":
        from expertd_engine.bench.device_decode import cells_of
        from expertd_engine.bench.device_prefill import device_prefill

        cells = cells_of(options)
        return device_prefill(read_options(options, _store(options)), cells)
    from expertd_engine.bench.prefill import prefill

    return prefill(read_options(options, _store(options)))


def _serve(options: argparse.Namespace) -> str:
    from expertd_engine.bench.options import read_options
    from expertd_engine.bench.serve import serve

    return serve(read_options(options, _store(options)))


def _io(options: argparse.Namespace) -> str:
    from expertd_engine.bench.bandwidth import io
    from expertd_engine.experts.store import ExpertStore

    return io(ExpertStore.open(_store(options)), options.threads, options.io_threads, options.runs)


def _perplexity(options: argparse.Namespace) -> str:
    from expertd_engine.bench.perplexity import perplexity

    formats = options.formats.split(",")
    with progress_bar() as progress:
        return perplexity(options.model, options.cache_dir, formats, windows=options.windows, progress=progress)


def _foresight(options: argparse.Namespace) -> str:
    from expertd_engine.bench.foresight import asked_of, foresight
    from expertd_engine.bench.protocol import EngineSpec

    spec = EngineSpec(
        store=str(_store(options)),
        policy=options.policy,
        threads=options.threads,
        io_threads=options.io_threads,
        seed=options.seed,
        device=options.device,
        disk_mib_s=options.disk_mib_s,
        hints=options.hints,
    )
    request = asked_of(options.pairs, options.tokens)
    routings = options.routing.split(",")
    with progress_bar() as progress:
        return foresight(spec, request, options.timeout, routings, options.trace, progress)


def _quality(options: argparse.Namespace) -> str:
    from expertd_engine.bench.quality import quality

    with progress_bar() as progress:
        return quality(
            _store(options),
            options.tokens,
            methods=options.methods.split(",") if options.methods else None,
            factors=[float(factor) for factor in options.slots.split(",")] if options.slots else None,
            threads=options.threads,
            io_threads=options.io_threads,
            png=options.png,
            progress=progress,
        )


def _virtual(options: argparse.Namespace) -> str:
    from expertd_engine.bench.virtual_speed import virtual_speed

    return virtual_speed(
        _store(options),
        options.slots,
        pairs=options.pairs,
        tokens=options.tokens,
        threads=options.threads,
        io_threads=options.io_threads,
        device=options.device,
    )


def _planner(options: argparse.Namespace) -> str:
    from expertd_engine.bench.planned import planner

    routings = [] if options.only == "memory" else options.routing.split(",")
    memory = options.only != "speed"
    budgets = options.budgets.split(",")
    return planner(options.stores, routings, budgets, rounds=options.rounds, tokens=options.tokens, memory=memory)


def _make_model(options: argparse.Namespace) -> str:
    from expertd_engine.bench.make_model import make_model
    from expertd_engine.bench.shapes import Cut

    with progress_bar() as progress:
        store = make_model(
            options.shape,
            options.destination,
            options.experts,
            options.dense,
            cut=Cut(options.layers, options.vocabulary, options.narrow),
            order=TARGETS[options.order],
            one_layer=options.one_layer,
            seed=options.seed,
            force=options.force,
            progress=progress,
        )
    return f"{store.path}: {store.index.name}, {store.index.expert_bytes_total()} bytes of experts"


def _readme(options: argparse.Namespace) -> str:
    from expertd_engine.bench.readme import Asked, readme

    asked = Asked(
        traces=options.traces, requests=options.requests, cached=options.cached, load=options.load,
        max_sequences=options.max_sequences, max_step_tokens=options.max_step_tokens, real_requests=options.real,
        threads=options.threads, io_threads=options.io_threads, real_arms=options.real_arms,
        real_only=options.real_only, disk_mib_s=options.disk_mib_s,
    )  # fmt: skip
    with progress_bar() as progress:
        return readme(_store(options), options.texts, options.out, asked, progress)


def _routing(options: argparse.Namespace) -> str:
    from expertd_engine.bench import fit_routing

    if options.fit:
        fit_routing.refit()
    return fit_routing.describe()


def _store(options: argparse.Namespace) -> Path:
    from expertd_engine.sources import resolve

    target = "cpu"
    if getattr(options, "device", "cpu") == "cuda" and options.command != "serve":  # which refuses it in its own words
        from expertd_engine.cards import require_card  # imports torch

        require_card()
        target = "gpu"
    with progress_bar() as progress:
        return resolve(options.model, options.cache_dir.expanduser(), progress=progress, target=target)


_RUNS: dict[str, Callable[[argparse.Namespace], str]] = {
    "decode": _decode,
    "prefill": _prefill,
    "serve": _serve,
    "io": _io,
    "foresight": _foresight,
    "quality": _quality,
    "virtual": _virtual,
    "planner": _planner,
    "perplexity": _perplexity,
    "make-model": _make_model,
    "readme": _readme,
    "routing": _routing,
}
