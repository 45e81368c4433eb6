"""Draws what `bench.readme` measured: hit ratios by capacity, and latencies by way of serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertd_engine.pictures import new_figure, save


def draw(values: Mapping[str, Any], folder: Path) -> None:
    """`hits.png` and `latency.png` in `folder`. Raises UsageError without matplotlib."""
    figure = new_figure(5, 3.5)
    axes = figure.subplots()
    cached = [int(one) for one in values["hit_ratios"]]
    for policy in ("lru", "next-use", "clairvoyant"):
        axes.plot(cached, [100 * of[policy] for of in values["hit_ratios"].values()], marker="o", label=policy)
    axes.set(xlabel="experts cached in a layer", ylabel="hits, %", xticks=cached)
    axes.legend()
    save(figure, folder / "hits.png")
    figure = new_figure(7, 4)
    axes = figure.subplots()
    names = list(values["simulated"])[::-1]
    places = range(len(names))
    for offset, figure_name, label in ((0.2, "mean_ms", "mean"), (-0.2, "p95_ms", "95 % of requests")):
        widths = [values["simulated"][name][figure_name] for name in names]
        axes.barh([place + offset for place in places], widths, 0.38, label=label)
    axes.set(yticks=list(places), yticklabels=names, xlabel="latency, ms a token (simulated)")
    axes.legend()
    save(figure, folder / "latency.png")
