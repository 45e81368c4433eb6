"""What the demo's figures and weights came from: jobs over one work folder, shared by as many processes as GPUs.

`python -m expertd_engine.refactor.demo.recipe SRC TEXTS WORK --worker 0/2 --jobs PREFIX…`: SRC is the dense model,
TEXTS what `demo.texts` and `demo.answers` wrote, WORK takes everything else. No prefixes: all
jobs; `--list` names them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch._dynamo import config as dynamo

from expertd_engine.console import Progress, run_command
from expertd_engine.publish import exclusive
from expertd_engine.refactor.contest import Contest, baseline_of, branched
from expertd_engine.refactor.corpus import Corpus, read_corpus
from expertd_engine.refactor.demo.texts import FURTHER_LANGUAGES, LANGUAGES
from expertd_engine.refactor.dense import Dense, open_dense
from expertd_engine.refactor.pipeline import TUNED, Job, Workshop
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.training import Recipe

STEPS = {
    "teacher": 160, "sweep": 60, "final": 230, "demo": 676, "sparse": 200, "long-sweep": 140, "long-final": 1234,
    "branch-base": 400, "branch-sweep": 110, "branch-final": 579, "further-base": 400,
    "further-sweep": 110, "further-final": 1200,
}  # fmt: skip
"""Of 48 windows of 1,024 tokens, of 24 in the long runs; `--scale` multiplies them."""
RATES = (3e-4, 6e-4, 1.2e-3)
LONG_RATES = (1e-3, 2e-3, 4e-3)
BRANCH_RATES = (4e-4, 8e-4, 1.6e-3)
SEEDS = (0, 1, 2)
DOMAINS = ("c-headers", "chat", "dictionary", "german", "kernel-docs", "manuals", "prose", "python")
"""Of all runs; the branched ones have `texts.LANGUAGES` besides, the further ones all languages, and the demo's chat
has `own`."""

INDEX = Shape(Routing.INDEX, permanent=128, experts=8, top_k=1, from_dense=640, width=640)
LAYERS = Shape(Routing.LAYERS, permanent=256, experts=16, top_k=5, from_dense=80, width=96)
BRANCHED = replace(INDEX, experts=len(DOMAINS) + len(LANGUAGES))
FURTHER = replace(BRANCHED, experts=BRANCHED.experts + len(FURTHER_LANGUAGES))
FURTHER_WEIGHTS = {
    "c-headers": 7.2, "chat": 2.3, "chinese": 3.9, "czech": 2.8, "dictionary": 6.8, "dutch": 2.3, "finnish": 1.9,
    "french": 5.4, "german": 6.9, "greek": 4.6, "hungarian": 2.5, "japanese": 7.2, "kernel-docs": 6.8, "korean": 2.8,
    "manuals": 7.2, "polish": 4.1, "prose": 3.3, "python": 7.2, "russian": 6.6, "spanish": 3.1, "turkish": 2.7,
}  # fmt: skip
"""Millions of tokens: shares by size, so that no domain's text comes again before the others' has come, which experts
suffer from more than one model for all does."""
HEADS = replace(LAYERS, routing=Routing.HEADS)
FINE = Shape(Routing.LAYERS, permanent=256, experts=64, top_k=8, from_dense=20, width=64)
WIDE = replace(FINE, top_k=4, width=128)
MANY = replace(FINE, experts=128, from_dense=10)
DEMO = Shape(
    Routing.INDEX, permanent=896, experts=8, top_k=1, from_dense=384, width=384, rank=32, shared_basis=True,
    attention_rank=48,
)  # fmt: skip
SPARSE = Shape(
    Routing.LAYERS, permanent=256, experts=64, top_k=8, from_dense=20, width=32, rank=20, shared_basis=True,
    attention_rank=16,
)  # fmt: skip


def jobs(dense: Dense, scale: float = 1.0, *, compiled: bool) -> list[Job]:
    """All jobs in an order in which each finds what it needs."""
    steps = {name: max(1, round(count * scale)) for name, count in STEPS.items()}
    base = Recipe(
        steps=steps["sweep"], learning_rate=6e-4, router_steps=200, overlap_share=0.0, micro_rows=48, compile=compiled
    )
    sides = {"index": INDEX, "pruned": baseline_of(INDEX, dense), "fine": FINE}
    found = [Job(TUNED, None, replace(base, steps=steps["teacher"], learning_rate=3e-4), keep=True)]
    for name, shape in sides.items():
        found += [Job(f"sweep-{name}-{rate:g}", shape, replace(base, learning_rate=rate), TUNED) for rate in RATES]
        found.append(Job(f"plain-{name}", shape, base))  # without any teacher
    for seed in SEEDS:
        for name, shape in sides.items():
            swept = tuple(f"sweep-{name}-{rate:g}" for rate in RATES)
            found.append(
                Job(f"final-{name}-{seed}", shape, replace(base, steps=steps["final"], seed=seed), TUNED, swept)
            )
    gates = replace(base, steps=steps["sparse"], router_steps=60, rounds=1, learning_rate=1e-3)
    likeness = replace(
        base, steps=steps["demo"], learning_rate=1.5e-3, router_steps=1600, micro_rows=24, distillation=1.0,
        labelled=0.5, domain_weights={"chat": 12.0},
    )  # fmt: skip
    return [
        *found,
        Job("layers", LAYERS, gates, TUNED),
        Job("heads", HEADS, replace(gates, rounds=2, router_steps=200), TUNED),
        Job("demo", DEMO, likeness, "dense", keep=True),
        Job("sparse", SPARSE, replace(gates, domain_weights={"chat": 3.0}), "dense", keep=True),
        *_long_jobs(dense, steps, compiled=compiled),
        *_branched_jobs("branch-", BRANCHED, dense, steps, {}, compiled=compiled),
        *_branched_jobs("further-", FURTHER, dense, steps, FURTHER_WEIGHTS, compiled=compiled),
    ]


def _long_jobs(dense: Dense, steps: Mapping[str, int], *, compiled: bool) -> list[Job]:
    """Routers in every layer against pruning, for more tokens and without a teacher."""
    base = Recipe(
        steps=steps["long-sweep"], learning_rate=2e-3, router_steps=50, rounds=1, rows=24, micro_rows=24,
        distillation=0.0, overlap_share=0.0, balance=0.01, compile=compiled,
    )  # fmt: skip
    others = {"wide": WIDE, "many": MANY, "index": INDEX}
    found = [Job(f"long-sweep-{name}-{base.learning_rate:g}", shape, base) for name, shape in others.items()]
    sides = {"pruned": baseline_of(FINE, dense), "fine": FINE}
    contest = Contest("long-", sides, base, replace(base, steps=steps["long-final"]), LONG_RATES, SEEDS)
    return found + contest.jobs()


def _branched_jobs(
    run: str, shape: Shape, dense: Dense, steps: Mapping[str, int], weights: Mapping[str, float], *, compiled: bool
) -> list[Job]:
    """Experts that begin as copies of a pruned model's FFNs after its first steps, against that model going on."""
    base = Recipe(
        steps=steps[f"{run}base"], learning_rate=1e-3, router_steps=800, distillation=0.0, domain_weights=weights,
        compile=compiled,
    )  # fmt: skip
    sides = {"index": shape, "pruned": baseline_of(shape, dense)}
    short, final = (replace(base, steps=steps[f"{run}{stage}"]) for stage in ("sweep", "final"))
    bases, contest = branched(Contest(run, sides, short, final, BRANCH_RATES, SEEDS), sides["pruned"], base)
    return bases + contest.jobs()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expertd_engine.refactor.demo.recipe", description=__doc__)
    parser.add_argument("source", type=Path, help="the dense model: checkpoint folder or GGUF file")
    parser.add_argument("texts", type=Path, help="one folder a domain")
    parser.add_argument("work", type=Path, help="folder of everything in between, corpus, results and weights")
    parser.add_argument("--jobs", nargs="*", default=[], metavar="PREFIX", help="prefixes of jobs; none: all")
    parser.add_argument("--worker", default="0/1", help="this process's number and how many there are")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all numbers of steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    dynamo.recompile_limit = 128  # jobs of many shapes in one process; beyond it they run uncompiled
    dense = open_dense(options.source, device)
    folder = options.work / "corpus"
    compute = torch.bfloat16 if cuda else torch.float32
    with exclusive(folder):  # the first process makes what all need
        corpus = read_corpus(options.texts, dense.fast_tokenizer, dense.end_of_text, folder, min_tokens=10**5)
    worker, workers = map(int, options.worker.split("/"))
    wanted = tuple(options.jobs) or ("",)
    chosen = [job for job in jobs(dense, options.scale, compiled=cuda) if job.name.startswith(wanted)]
    if options.list:
        print(*(job.name for job in chosen), sep="\n")
        return
    for job in chosen[worker::workers]:
        begun = time.monotonic()
        result = _shop(job, options.work, dense, corpus, compute).run(job)
        score = result["score"]
        took = time.monotonic() - begun
        print(f"{job.name}: {score['mean_perplexity']:.4f}, cloze {score['cloze']:.3f}, {took:.0f} s", flush=True)


def _shop(job: Job, work: Path, dense: Dense, corpus: Corpus, compute: torch.dtype) -> Workshop:
    """Where a job runs: the branched, the further ones and the demo have texts, and so statistics and scores, of their
    own."""
    kind = next((one for one in ("branch", "further", "demo") if job.name.startswith(one)), "")
    languages = {"branch": [*LANGUAGES], "further": [*LANGUAGES, *FURTHER_LANGUAGES]}.get(kind, [])
    texts = corpus.only((*DOMAINS, *languages))
    if kind == "demo":
        own = corpus.only(["own"])
        chat = np.concatenate([texts.train["chat"], own.train["own"]])
        texts = replace(texts, train={**texts.train, "chat": chat}, made_of={**texts.made_of, **own.made_of})
    shop = Workshop(work / kind, dense, texts, compute, progress=_lines())
    with exclusive(shop.folder):  # the first process makes what all need
        shop.statistics()
        shop.score_dense()
    return shop


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
