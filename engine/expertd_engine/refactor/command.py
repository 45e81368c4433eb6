"""`expertd convert --texts` and `--trained`: a dense model and texts become a checkpoint. Owns options and order."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from expertd_engine.console import progress_bar
from expertd_engine.errors import ModelError, UsageError
from expertd_engine.refactor.contest import Contest, baseline_of, branched
from expertd_engine.refactor.corpus import WHOLE, Corpus, read_corpus
from expertd_engine.refactor.delta import load_student
from expertd_engine.refactor.dense import Dense, open_dense
from expertd_engine.refactor.domains import cluster_domains
from expertd_engine.refactor.export import check_backbone, export
from expertd_engine.refactor.pipeline import TUNED, Job, Workshop, check_budget
from expertd_engine.refactor.report import write_report
from expertd_engine.refactor.shape import NEURON_MULTIPLE, Routing, Shape
from expertd_engine.refactor.training import Recipe

SHIPPED = {name: Path(__file__).with_name("demo") / f"{name}.safetensors" for name in ("demo", "sparse")}
"""What comes with this package, trained on SmolLM2-135M-Instruct."""

_RATES = (3e-4, 6e-4, 1.2e-3)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the conversion by training."""
    group = parser.add_argument_group("refactoring (with --texts)")
    group.add_argument("--routing", choices=[kind.value for kind in Routing if kind != Routing.NONE], default="index",
                       help="index: one choice for all layers, known before the step; heads: one a layer, likewise; "
                       "layers: routers in every layer, a standard Qwen2-MoE checkpoint (default: index)")  # fmt: skip
    group.add_argument("--experts", type=int, help="default: one a domain; 16 where routing is finer")
    group.add_argument("--top-k", type=int, help="default: 1 for an index, else a quarter of the experts")
    group.add_argument("--active", type=float, default=0.5, help="share of FFN neurons a token uses (default: 0.5)")
    group.add_argument("--permanent", type=float, default=0.125, help="share of them always on (default: 0.125)")
    group.add_argument("--rank", type=int, help="train low-rank deltas of this rank, not all weights")
    group.add_argument("--steps", type=int, default=500, help="of the experts (default: 500)")
    group.add_argument("--router-steps", type=int, default=200, help="of the router (default: 200)")
    group.add_argument("--pruned-steps", type=int, default=0, metavar="N",
                       help="train a pruned model of equal active bytes for N steps first, and let experts begin as "
                       "copies of its FFNs (with --routing index, without --rank)")  # fmt: skip
    group.add_argument("--rows", type=int, default=48, help="windows a step (default: 48)")
    group.add_argument("--micro-rows", type=int, default=8, help="windows at a time, as memory allows (default: 8)")
    group.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    group.add_argument("--learning-rate", type=float, default=6e-4, help="highest of the run (default: 6e-4)")
    group.add_argument(
        "--distillation", type=float, default=0.5, help="share of the loss that is the dense model's word"
    )
    group.add_argument("--seeds", type=int, default=1, help="runs of the final shape, a seed each (default: 1)")
    group.add_argument("--baselines", action="store_true",
                       help="also prune to equal active bytes, and try three learning rates on both sides")  # fmt: skip
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="PyTorch's (default: cuda, else cpu)"
    )
    group.add_argument(
        "--work", type=Path, help="folder of everything in between; run again to go on (default: DST.work)"
    )


def merge(options: argparse.Namespace) -> None:
    """`--trained FILE`: the dense model and what was trained on it become a checkpoint."""
    trained = SHIPPED.get(str(options.trained), options.trained)
    merge_trained(options.source, trained, options.destination, options.dtype)


def merge_trained(source: Path, trained: Path, destination: Path, dtype: str) -> None:
    """The checkpoint `destination`, in `bf16` or `float32`. Raises ModelError for what was trained on another model."""
    dense = open_dense(source, torch.device("cpu"))
    export(load_student(dense, trained), dense, destination, _torch_dtype(dtype))


def refactor(options: argparse.Namespace) -> None:
    """`--texts DIR`: train, score, report, export. What a killed run has done is found again."""
    if options.destination.exists():
        raise ModelError(f"{options.destination} exists already: name a new folder, or remove it first")
    _check(options)
    device = torch.device(options.device)
    work = options.work or options.destination.with_name(options.destination.name + ".work")
    dense = open_dense(options.source, device)
    check_backbone(dense)
    with progress_bar() as progress:
        least = options.length + 1
        corpus = read_corpus(
            options.texts, dense.fast_tokenizer, dense.end_of_text, work / "corpus", min_tokens=least, progress=progress
        )
        if corpus.domains == [WHOLE]:
            corpus = cluster_domains(dense, corpus, options.experts or 8, length=options.length, progress=progress)
        check_budget(corpus, options.length)
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        shop = Workshop(work, dense, corpus, compute, evaluation_length=options.length, progress=progress)
        kept = _run(shop, options, shape_of(options, dense, corpus))
        print(f"report: {write_report(work, corpus.domains)}")
        export(shop.trained(kept), dense, options.destination, _torch_dtype(options.dtype))


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that cannot be, or do not go together."""
    for name, value in (("--seeds", options.seeds), ("--micro-rows", options.micro_rows)):
        if value < 1:
            raise UsageError(f"{name} {value} is not allowed: give 1 or more")
    if options.micro_rows > options.rows or options.rows % options.micro_rows:
        raise UsageError(f"--micro-rows {options.micro_rows} does not divide --rows {options.rows}")
    if options.pruned_steps < 0:
        raise UsageError(f"--pruned-steps {options.pruned_steps} is not allowed: give 1 or more, or 0 for none")
    if options.pruned_steps and (options.routing != Routing.INDEX or options.rank is not None):
        found = f"--routing {options.routing}" + ("" if options.rank is None else f" --rank {options.rank}")
        raise UsageError(
            f"--pruned-steps {options.pruned_steps} is not allowed with {found}: only experts of one index with all "
            f"their weights trained can begin as copies of a pruned FFN (--routing index without --rank)"
        )


def shape_of(options: argparse.Namespace, dense: Dense, corpus: Corpus) -> Shape:
    """The shape that the options ask for. Raises ModelError or UsageError for what cannot be."""
    if not 0 < options.active <= 1 or not 0 <= options.permanent < options.active:
        raise UsageError(f"--permanent {options.permanent} and --active {options.active}: 0 ≤ permanent < active ≤ 1")
    routing = Routing(options.routing)
    experts = options.experts or (len(corpus.domains) if routing == Routing.INDEX else 16)
    top_k = options.top_k or (1 if routing == Routing.INDEX else max(1, experts // 4))
    permanent = _whole(options.permanent * dense.neurons)
    width = _whole((options.active * dense.neurons - permanent) / top_k)
    from_dense = width if routing == Routing.INDEX else min(width, (dense.neurons - permanent) // experts)
    return Shape(routing, permanent, experts, top_k, from_dense, width, options.rank)


def _run(shop: Workshop, options: argparse.Namespace, shape: Shape) -> Job:
    """All jobs; the job whose model is exported."""
    recipe = Recipe(
        steps=options.steps, learning_rate=options.learning_rate, router_steps=options.router_steps, rows=options.rows,
        micro_rows=options.micro_rows, length=options.length, distillation=options.distillation,
        compile=shop.compute != torch.float32,
    )  # fmt: skip
    jobs, kept = _jobs(options, recipe, shape, shop.dense)
    for job in jobs:
        shop.check(job)  # before hours of others
    shop.score_dense()
    if options.distillation:
        shop.run(Job(TUNED, None, replace(recipe, steps=max(1, options.steps // 2)), keep=True))
    for job in jobs:
        shop.run(job)
    return kept


def _jobs(options: argparse.Namespace, recipe: Recipe, shape: Shape, dense: Dense) -> tuple[list[Job], Job]:
    """All but the teacher's, in order, and the one whose model is exported."""
    pruned = _pruned(options, shape, dense)
    sides = {options.routing: shape, **({"pruned": pruned} if pruned is not None and options.baselines else {})}
    short = replace(recipe, steps=max(1, recipe.steps // 4))
    rates, seeds = _RATES if options.baselines else (), range(options.seeds)
    contest = Contest("", sides, short, recipe, rates, seeds, TUNED if options.distillation else None)
    bases: list[Job] = []
    if pruned is not None and options.pruned_steps:
        contest = replace(contest, run="branch-")
        bases, contest = branched(contest, pruned, replace(recipe, steps=options.pruned_steps))
    wanted = contest.final_name(options.routing, 0)
    jobs = [replace(job, keep=job.keep or job.name == wanted) for job in (*bases, *contest.jobs())]
    return jobs, next(job for job in jobs if job.name == wanted)


def _pruned(options: argparse.Namespace, shape: Shape, dense: Dense) -> Shape | None:
    """The pruned model, where one is asked for. Raises UsageError where there can be none."""
    if not (options.baselines or options.pruned_steps):
        return None
    pruned = baseline_of(shape, dense)
    if pruned.permanent > dense.neurons:
        raise UsageError(
            f"--active {options.active} leaves no room to prune: as many active bytes as with the router are "
            f"{pruned.permanent} neurons of {dense.neurons}; lower it, or do without --baselines and --pruned-steps"
        )
    return pruned


def _whole(neurons: float) -> int:
    return int(neurons) // NEURON_MULTIPLE * NEURON_MULTIPLE


def _torch_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16
