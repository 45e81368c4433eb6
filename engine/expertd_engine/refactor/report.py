"""`report.md` of a work folder: what was run, how good each model is, and plots of losses and routing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Results = Mapping[str, Mapping[str, Any]]


def write_report(folder: Path, domains: Sequence[str]) -> Path:
    """Write `folder/report.md` anew from `results/`, `notes.md` and the statistics, with SVG plots beside it."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    lines = ["# Refactoring report", "", *_scores(results), "", *_summary(results)]
    notes = folder / "notes.md"
    if notes.is_file():
        lines.append(notes.read_text(encoding="utf-8").strip())
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    for name, result in results.items():
        for stage in ("router", "experts"):
            curve = result.get("curve", {}).get(stage)
            if curve and len(curve) > 1:
                (plots / f"{name}-{stage}.svg").write_text(_line_plot(f"{name}: loss of {stage}", curve))
                lines += ["", f"![{name}: loss of {stage}](plots/{name}-{stage}.svg)"]
        if result.get("routing"):
            (plots / f"{name}-routing.svg").write_text(_heat_map(f"{name}: routing by domain", result["routing"]))
            lines += ["", f"![{name}: routing by domain](plots/{name}-routing.svg)"]
    energies = folder / "statistics.safetensors"
    if energies.is_file():
        lines += _statistics(load_file(energies)["energy"], domains, plots)
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _scores(results: Results) -> list[str]:
    domains = sorted({domain for result in results.values() for domain in result["score"]["perplexity"]})
    lines = [
        f"| run | learning rate | tokens | perplexity | cloze | {' | '.join(domains)} |",
        f"| --- | --- | --- | --- | --- | {' | '.join('---' for _ in domains)} |",
    ]
    for name, result in results.items():
        score, job = result["score"], result.get("job")
        rate = f"{job['recipe']['learning_rate']:g}" if job else "–"
        tokens = f"{result['curve']['tokens'] / 1e6:.1f} M" if job else "–"
        each = " | ".join(f"{found:.2f}" if (found := score["perplexity"].get(one)) else "–" for one in domains)
        cloze = f"{score['cloze']:.1%}"
        lines.append(f"| {name} | {rate} | {tokens} | {score['mean_perplexity']:.3f} | {cloze} | {each} |")
    return lines


def _summary(results: Results) -> list[str]:
    """Of each run (what stands before `final-`): the pruned baseline against the other kinds, over the same seeds."""
    finals: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, result in results.items():
        run, final, kind = name.rpartition("-")[0].rpartition("final-")
        if final:
            finals.setdefault(run, {}).setdefault(kind, []).append(result["score"])
    return [line for run, kinds in finals.items() if "pruned" in kinds for line in _against_pruned(run, kinds)]


def _against_pruned(run: str, kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    pruned, lines = kinds["pruned"], []
    for kind, scores in kinds.items():
        if kind == "pruned":
            continue
        ratio = statistics.mean(one["mean_perplexity"] for one in scores) / statistics.mean(
            one["mean_perplexity"] for one in pruned
        )
        points = 100 * (
            statistics.mean(one["cloze"] for one in scores) - statistics.mean(one["cloze"] for one in pruned)
        )
        lines.append(
            f"{run}{kind} against pruned, mean of {len(scores)} seeds: "
            f"perplexity × {ratio:.3f}, cloze {points:+.1f} points"
        )
        lines.append("")
    return lines


def _statistics(energy: Tensor, domains: Sequence[str], plots: Path) -> list[str]:
    """Energy held by the strongest neurons, and how much domains' strongest halves have in common."""
    ordered = energy.sort(dim=2, descending=True).values.cumsum(dim=2)
    shares = (ordered / ordered[..., -1:])[..., :: max(1, energy.shape[2] // 64)].mean(dim=(0, 1)).tolist()
    points = [(100 * i / (len(shares) - 1), share) for i, share in enumerate(shares)]
    (plots / "energy.svg").write_text(_line_plot("energy of the strongest neurons, % of neurons", points))
    top = energy.topk(energy.shape[2] // 2, dim=2).indices
    masks = torch.zeros_like(energy).scatter_(2, top, 1.0)
    common = torch.einsum("aln,bln->ab", masks, masks) / masks[0].sum()
    overlap = dict(zip(domains, common.tolist(), strict=True))
    (plots / "overlap.svg").write_text(_heat_map("overlap of the domains' strongest halves", overlap))
    return ["", "![energy](plots/energy.svg)", "", "![overlap](plots/overlap.svg)"]


def _line_plot(title: str, points: Sequence[Sequence[float]]) -> str:
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    low, high = min(ys), max(ys)
    path = " ".join(
        f"{50 + 430 * (x - xs[0]) / ((xs[-1] - xs[0]) or 1):.1f},{230 - 190 * (y - low) / ((high - low) or 1):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    marks = ((10, 235, f"{low:.3g}"), (10, 45, f"{high:.3g}"), (50, 248, f"{xs[0]:g}"), (450, 248, f"{xs[-1]:g}"))
    body = f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>'
    return _svg(title, 500, 260, body + "".join(_text(*mark) for mark in marks))


def _heat_map(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    body = ""
    for number, (name, values) in enumerate(rows.items()):
        y = 30 + 26 * number
        body += _text(5, y + 17, name)
        for column, value in enumerate(values):
            x = 130 + 46 * column
            body += f'<rect x="{x}" y="{y}" width="44" height="24" fill="#1f6feb" fill-opacity="{value:.3f}"/>'
            body += _text(x + 10, y + 17, f"{value:.2f}")
    return _svg(title, 140 + 46 * max(map(len, rows.values())), 40 + 26 * len(rows), body)


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}">{text}</text>'


def _svg(title: str, width: int, height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{_text(5, 18, title)}{body}</svg>\n'
    )
