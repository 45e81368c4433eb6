"""`expertd plan`: what a budget gives, before anything is loaded. Reads the store's profile; the planner decides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from expertd_engine.config import Config, parse_size
from expertd_engine.console import Progress, progress_bar, run_command
from expertd_engine.errors import BudgetError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.pictures import new_figure, save
from expertd_engine.planning.planner import Plan, Request, make_plan
from expertd_engine.planning.profile import PathCurve, Profile
from expertd_engine.profile_file import read_profile

SWEEP = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Expert budgets of the picture, of all expert bytes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd plan", description="Say what a budget gives, before it is spent.")
    parser.add_argument("model", metavar="MODEL", help="store, or whatever `expertd serve` takes; profiled before")
    parser.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    parser.add_argument("--memory-budget", metavar="SIZE", help="as for serve")
    parser.add_argument("--expert-budget", metavar="SIZE", help="as for serve, such as 25%% or 2GiB")
    parser.add_argument("--expert-mode", choices=("exact", "virtual"), default="exact", help="as for serve")
    parser.add_argument("--virtual-share", type=float, default=Config().virtual_share, metavar="X", help="as for serve")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as for serve")
    parser.add_argument("--routing", default="model", metavar="R", help="whose misses, of those profiled")
    parser.add_argument("--explain", action="store_true", help="print what the last slot of each layer is worth")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw budget against speed and quality")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        store = ExpertStore.open(resolve_model(options, progress))
    profile = read_profile(store)
    request = _request(options)
    plan = make_plan(profile, request)
    print(msgspec.json.encode(plan_as_json(plan)).decode() if options.json else "\n".join(describe(plan, profile)))
    if options.explain:
        print("\n".join(explain(plan, profile)))
    if options.png is not None:
        draw(profile, request, options.png)


def resolve_model(options: argparse.Namespace, progress: Progress) -> Path:
    """Where the store of the model named on the command line is."""
    from expertd_engine.sources import resolve  # imports torch, which a plan of a prepared store can do without

    path = Path(options.model)
    return (
        path
        if (path / "store.json").is_file()
        else resolve(options.model, options.cache_dir.expanduser(), progress=progress)
    )


def _request(options: argparse.Namespace) -> Request:
    if options.memory_budget and options.expert_budget:
        raise UsageError("give --memory-budget or --expert-budget, not both: each decides how many experts fit")
    memory, experts = options.memory_budget, options.expert_budget
    return Request(
        mode=options.expert_mode,
        memory_budget=parse_size(memory) if memory else None,
        expert_budget=parse_size(experts, share_allowed=True) if experts else None,
        max_model_len=options.max_model_len,
        share=options.virtual_share,
        routing=options.routing,
    )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    return {**msgspec.to_builtins(plan), "tok_s": plan.tok_s}


def describe(plan: Plan, profile: Profile) -> list[str]:
    """The plan for people."""
    share = plan.expert_budget_bytes / profile.expert_bytes
    lines = [
        f"experts     {plan.expert_budget_bytes:>16,} bytes, {share:.0%} of all",
        f"KV          {plan.kv_blocks * profile.memory.kv_block:>16,} bytes, {plan.kv_blocks} blocks",
        f"memory      {plan.memory_bytes:>16,} bytes at most",
        f"decode      {plan.tok_s:>16.2f} tokens a second, one sequence",
        f"hit rate    {plan.hit_rate:>16.1%}",
    ]
    if plan.mode == "virtual":
        lines.append(f"divergence  {plan.divergence:>16.4f} nats a token from exact mode")
        lines.append(f"slots       {_slots(plan, profile)}")
    return lines


def _slots(plan: Plan, profile: Profile) -> str:
    if profile.model.paths is None:
        return " ".join(map(str, plan.slots))
    return f"{min(plan.slots)} in each layer: so many of {min(profile.num_experts)} whole paths"


def explain(plan: Plan, profile: Profile) -> list[str]:
    """What one more slot was worth, layer by layer; of whole paths, what each is."""
    if plan.mode == "exact":
        return ["one cache serves all layers: a slot goes to whichever layer uses it; a fixed split can only lose"]
    if profile.model.paths is not None:
        return _explain_paths(plan, profile, profile.model.paths)
    lines = ["layer  slots  sensitivity  the last slot saved, nats a token"]
    for gain in plan.gains:
        assert gain.layer is not None, "only where whole paths are held"
        curve = profile.model.layers[gain.layer]
        lines.append(f"{gain.layer:>5}  {gain.slots:>5}  {curve.sensitivity:>11.4f}  {gain.saved:.6f}")
    return lines


def _explain_paths(plan: Plan, profile: Profile, curve: PathCurve) -> list[str]:
    lines = ["paths  of their bytes  divergence  the last path saved, nats a token"]
    for count in range(1, curve.paths[-1] + 1):
        saved = f"{curve.loss(count - 1) - curve.loss(count):.6f}" if count > 1 else "-"
        here = "  <- this plan" if count == min(plan.slots) else ""
        nbytes = count * sum(profile.record_bytes)
        lines.append(f"{count:>5}  {nbytes:>14,}  {curve.loss(count):>10.4f}  {saved}{here}")
    return lines


def draw(profile: Profile, request: Request, path: Path) -> None:
    """Budget against predicted speed, hit rate and divergence. Raises UsageError without matplotlib."""
    figure = new_figure(8, 4.5)
    speed, quality = figure.subplots(1, 2)
    for mode in ("exact", "virtual") if profile.model.has_virtual else ("exact",):
        plans = _sweep(profile, replace(request, mode=mode, memory_budget=None))
        gigabytes = [plan.expert_budget_bytes / 2**30 for plan in plans]
        speed.plot(gigabytes, [plan.tok_s for plan in plans], marker="o", label=mode)
        quality.plot(gigabytes, [plan.divergence for plan in plans], marker="o", label=mode)
    speed.set(xlabel="expert budget, GiB", ylabel="tokens a second", title="predicted decode")
    quality.set(xlabel="expert budget, GiB", ylabel="KL from exact, nats a token", title="predicted divergence")
    for axes in (speed, quality):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def _sweep(profile: Profile, request: Request) -> list[Plan]:
    plans = []
    for share in SWEEP:
        try:
            plans.append(
                make_plan(profile, replace(request, expert_budget=parse_size(f"{share:.0%}", share_allowed=True)))
            )
        except BudgetError:
            continue  # below what this mode can do with
    return plans
