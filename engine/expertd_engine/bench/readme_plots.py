"""Draws what `bench.readme` measured: hit ratios by capacity, and latencies by way of serving."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expertd_engine.errors import UsageError


def need_matplotlib() -> None:
    """Raises UsageError without it."""
    if find_spec("matplotlib") is None:
        raise UsageError("the plots need matplotlib: install expertd[bench]")


def draw(values: Mapping[str, Any], folder: Path) -> None:
    """`hits.png` and `latency.png` in `folder`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    cached = [int(one) for one in values["hit_ratios"]]
    for policy in ("lru", "next-use", "clairvoyant"):
        axes.plot(cached, [100 * of[policy] for of in values["hit_ratios"].values()], marker="o", label=policy)
    axes.set(xlabel="experts cached in a layer", ylabel="hits, %", xticks=cached)
    axes.legend()
    figure.savefig(folder / "hits.png", dpi=120)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(values["simulated"])[::-1]
    places = range(len(names))
    for offset, figure_name, label in ((0.2, "mean_ms", "mean"), (-0.2, "p95_ms", "95 % of requests")):
        widths = [values["simulated"][name][figure_name] for name in names]
        axes.barh([place + offset for place in places], widths, 0.38, label=label)
    axes.set(yticks=list(places), yticklabels=names, xlabel="latency, ms a token (simulated)")
    axes.legend()
    figure.savefig(folder / "latency.png", dpi=120)
