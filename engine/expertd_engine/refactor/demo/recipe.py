"""What the demo's figures and weights came from: jobs over one work folder, shared by as many processes as GPUs.

`python -m expertd_engine.refactor.demo.recipe WORK --worker 0/2 JOB…`; WORK holds `model/` (a checkpoint), `corpus/`,
and takes everything else. A job is named by a prefix: `sweep`, `final`, `demo`, …; `--list` names all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from expertd_engine.console import Progress, run_command
from expertd_engine.refactor.corpus import load_corpus
from expertd_engine.refactor.dense import Dense, open_dense
from expertd_engine.refactor.pipeline import TUNED, Job, Workshop
from expertd_engine.refactor.router import PregatingRouter, RouterShape
from expertd_engine.refactor.shape import Routing, Shape, pruned_shape
from expertd_engine.refactor.training import Recipe

RATES = (3e-4, 6e-4, 1.2e-3)
SEEDS = (0, 1, 2)

INDEX = Shape(Routing.INDEX, permanent=128, experts=8, top_k=1, from_dense=640, width=640)
LAYERS = Shape(Routing.LAYERS, permanent=256, experts=16, top_k=5, from_dense=80, width=96)
HEADS = replace(LAYERS, routing=Routing.HEADS)
FINE = Shape(Routing.LAYERS, permanent=256, experts=64, top_k=8, from_dense=20, width=64)
DEMO = Shape(
    Routing.INDEX, permanent=768, experts=8, top_k=1, from_dense=384, width=384, rank=12, attention_rank=24
)
SPARSE = Shape(
    Routing.LAYERS, permanent=256, experts=64, top_k=8, from_dense=20, width=32, rank=20, shared_basis=True,
    attention_rank=16,
)  # fmt: skip


def jobs(dense: Dense, steps: int, sweep_steps: int, compiled: bool) -> list[Job]:
    """All jobs in an order in which each finds what it needs."""
    router = PregatingRouter(RouterShape(dense.hidden_size, INDEX.experts), 0)
    router_size = sum(one.numel() for one in router.parameters())
    pruned = pruned_shape(INDEX.active, router_size, len(dense.layers), dense.hidden_size)
    base = Recipe(steps=steps, learning_rate=0.0, compile=compiled, overlap_share=0.0, router_steps=300)
    sides = {"index": INDEX, "pruned": pruned, "fine": FINE}
    found = [Job(TUNED, None, replace(base, steps=sweep_steps * 2, learning_rate=3e-4), keep=True)]
    for rate in RATES:
        short = replace(base, steps=sweep_steps, learning_rate=rate)
        found += [Job(f"sweep-{name}-{rate:g}", shape, short, TUNED) for name, shape in sides.items()]
    plain = replace(base, steps=sweep_steps, learning_rate=6e-4)
    found += [Job(f"plain-{name}", shape, plain) for name, shape in sides.items()]  # without any teacher
    for seed in SEEDS:
        for name, shape in sides.items():
            swept = tuple(f"sweep-{name}-{rate:g}" for rate in RATES)
            found.append(Job(f"final-{name}-{seed}", shape, replace(base, seed=seed), TUNED, swept))
    gates = replace(base, steps=steps * 2 // 3, router_steps=100, rounds=1, learning_rate=6e-4)
    found += [Job("layers", LAYERS, gates, TUNED), Job("heads", HEADS, replace(gates, rounds=2, router_steps=200), TUNED)]
    chatty = replace(base, learning_rate=2e-3, domain_weights={"chat": 3.0})
    found += [
        Job("demo", DEMO, chatty, "dense", keep=True),
        Job("sparse", SPARSE, replace(chatty, steps=steps * 2 // 3, router_steps=60, rounds=1), "dense", keep=True),
    ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expertd_engine.refactor.demo.recipe", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--jobs", nargs="*", default=[], metavar="PREFIX", help="prefixes of jobs; none: all")
    parser.add_argument("--worker", default="0/1", help="this process's number and how many there are")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sweep-steps", type=int, default=150)
    parser.add_argument("--micro-rows", type=int, default=24)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    dense = open_dense(options.work / "model", device)
    shop = Workshop(
        options.work, dense, load_corpus(options.work / "corpus"), torch.bfloat16 if cuda else torch.float32,
        evaluation_windows=64 if cuda else 2, progress=_lines(),
    )  # fmt: skip
    worker, workers = map(int, options.worker.split("/"))
    wanted = tuple(options.jobs) or ("",)
    chosen = [job for job in jobs(dense, options.steps, options.sweep_steps, cuda) if job.name.startswith(wanted)]
    if options.list:
        print(*(job.name for job in chosen), sep="\n")
        return
    if worker == 0:
        shop.score_dense()
    for job in chosen[worker::workers]:
        begun = time.monotonic()
        result = shop.run(replace(job, recipe=replace(job.recipe, micro_rows=_micro_rows(job, options, cuda))))
        score = result["score"]
        print(
            f"{job.name}: perplexity {score['mean_perplexity']:.4f} cloze {score['cloze']:.3f} "
            f"after {time.monotonic() - begun:.0f} s; {result['curve']['tokens']} tokens in {result['curve']['seconds']:.0f} s",
            flush=True,
        )  # fmt: skip


def _micro_rows(job: Job, options: argparse.Namespace, cuda: bool) -> int:
    """Windows at a time: routers in every layer, and the energies they learn from, take more memory."""
    rows = int(options.micro_rows) if cuda else 2
    return rows // 2 if job.shape is not None and job.shape.weighted else rows


def _lines() -> Progress:
    """A line on stderr every tenth of a stage."""
    shown: dict[str, int] = {}

    def show(stage: str, fraction: float) -> None:
        if shown.get(stage) != int(fraction * 10):
            shown[stage] = int(fraction * 10)
            print(f"[{os.getpid()} {time.strftime('%H:%M:%S')}] {stage} {fraction:.0%}", flush=True)

    return show


if __name__ == "__main__":
    raise SystemExit(main())
