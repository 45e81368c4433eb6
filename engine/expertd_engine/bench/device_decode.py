"""`expertd bench decode --device cuda`: one engine start, then cell after cell of budget, routes and hints.

Each cell's limits are those of the same card in the same run: all experts resident, the link as copies and kernels read
it, and the card's own memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import msgspec

from expertd_engine.bench.device_session import DeviceSession
from expertd_engine.bench.link import LinkSpeed, measure_link
from expertd_engine.bench.options import Options
from expertd_engine.bench.peer_transformers import measure
from expertd_engine.bench.protocol import Decoded, DecodeRequest, EngineFacts
from expertd_engine.bench.report import finish, number, percent, spread
from expertd_engine.bench.stats import bound_tok_s, median_interval, serial_tok_s
from expertd_engine.experts.payoff import SETTLED
from expertd_engine.planning.balance import SETTLED as BALANCED
from expertd_engine.snapshot import Tiers

ALL = "100%"
HEADER = (
    "experts", "routes", "hints", "streams", "tok/s", "95 %", "ms/step", "of resident", "of bound", "of serial",
    "of link", "hits", "late", "MB/token", "LRU MB/token", "experts/layer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured."""

    budget: str
    routing: str
    hints: str
    streams: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the card gives when nothing is missing, and what its link gives."""

    resident_tok_s: float
    link: LinkSpeed
    expert_s: float
    """Of a token's time with all resident, what reading its experts from the card's memory takes."""


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """All combinations of the `+`-separated lists that budget, routing, hints and streams may be; of each, one is left
    in `arguments`, for an engine to start with."""
    lists = [one.split("+") for one in (arguments.expert_budget or ALL, arguments.routing, arguments.hints)]
    arguments.expert_budget, arguments.routing, arguments.hints = (one[0] for one in lists)
    streams, arguments.streams = arguments.streams, [max(arguments.streams)]
    return [Cell(*one) for one in product(*lists, streams)]


def device_decode(options: Options, cells: Sequence[Cell]) -> str:
    """Run it; the report. Raises what starting an engine raises."""
    peer = None
    if options.peer == "transformers":
        streams = options.engine.streams
        peer = measure(options.store.path, streams, options.prompt, options.tokens, options.timeout_s)
    with closing(DeviceSession(options.engine)) as session:
        return decode_report(session, options, cells, peer)


def decode_report(session: DeviceSession, options: Options, cells: Sequence[Cell], peer: dict[str, Any] | None) -> str:
    """The cells, each beside its routes and streams with all experts resident."""
    facts = session.describe()
    link = measure_link(facts.record)
    request = DecodeRequest(options.tokens, options.warm, options.prompt)
    whole = {cell: replace(cell, budget=ALL, hints="none") for cell in cells}
    samples = {
        cell: _samples(session, cell, request, options.pairs) for cell in dict.fromkeys([*whole.values(), *cells])
    }
    tables = [
        _values(cell, found, _limits(facts, link, samples[whole.get(cell, cell)], cell.streams), options.tokens)
        for cell, found in samples.items()
    ]
    values = _summary(options, facts, link, tables, peer, session.vram_bytes()) | _misses(session.tiers())
    return finish(_title(options, facts), HEADER, [_row(one) for one in tables], _notes(facts, values), values)


def _samples(session: DeviceSession, cell: Cell, request: DecodeRequest, runs: int) -> list[Decoded]:
    session.retune(cell.budget, cell.routing, cell.hints, cell.streams)
    longest = DecodeRequest(request.tokens + 3 * request.warm, request.warm, request.prompt)  # that contexts hold
    for _ in range(math.ceil(_steps_to_settle(session, cell) / (longest.warm + longest.tokens))):
        session.decode(longest)
    return [session.decode(request) for _ in range(runs)]


def _steps_to_settle(session: DeviceSession, cell: Cell) -> int:
    """Until it is known whether hints pay, and whether sharing what is missed does: one after the other."""
    hints = SETTLED if cell.hints != "none" else 0
    shares = session.tiers().misses == "both" and cell.budget != ALL
    return hints + (BALANCED + SETTLED if shares else 0)


def _limits(facts: EngineFacts, link: LinkSpeed, resident: list[Decoded], streams: int) -> Limits:
    union = median(sample.union for sample in resident) or facts.top_k
    nbytes = union * facts.layers * facts.record / streams
    return Limits(median(sample.tok_s for sample in resident), link, nbytes / link.memory)


def _values(cell: Cell, samples: list[Decoded], limits: Limits, steps: int) -> dict[str, Any]:
    tokens = sum(sample.tokens for sample in samples)
    lookups = max(1, sum(sample.lookups for sample in samples))
    speed = median_interval([sample.tok_s for sample in samples])
    moved = sum(sample.transferred_bytes for sample in samples) / tokens
    missed = sum(sample.missed_bytes for sample in samples) / tokens
    bound = bound_tok_s(limits.resident_tok_s, moved, max(limits.link.copy, limits.link.kernel))
    serial = serial_tok_s(limits.resident_tok_s, missed, limits.link.kernel)
    rest_s = max(0.0, 1 / limits.resident_tok_s - limits.expert_s)
    link = 1 / (rest_s + missed / limits.link.kernel) if missed else limits.resident_tok_s
    return {
        "expert_budget": cell.budget, "routing": cell.routing, "hints": cell.hints, "streams": cell.streams,
        "tok_s": speed.median,
        "tok_s_interval": speed.as_json(), "resident_tok_s": limits.resident_tok_s, "bound_tok_s": bound,
        "serial_tok_s": serial, "link_tok_s": link, "resident_share": speed.median / limits.resident_tok_s,
        "bound_share": speed.median / bound, "serial_share": speed.median / serial, "link_share": speed.median / link,
        "step_s": median(sample.elapsed_s for sample in samples) / steps,
        "hit_ratio": sum(sample.hits for sample in samples) / lookups,
        "late_ratio": sum(sample.late for sample in samples) / lookups,
        "transferred_bytes_per_token": moved, "missed_bytes_per_token": missed,
        "lru_transferred_bytes_per_token": sum(sample.lru_transferred_bytes for sample in samples) / tokens,
        "stall_s_per_token_estimated": sum(sample.stall_s for sample in samples) / tokens,
        "experts_per_layer": median(sample.union for sample in samples),
        "peak_bytes": samples[-1].peak_bytes,
    }  # fmt: skip


def _summary(
    options: Options, facts: EngineFacts, link: LinkSpeed, tables: list[dict[str, Any]], peer: dict[str, Any] | None,
    vram: int,
) -> dict[str, Any]:  # fmt: skip
    first = tables[0]
    peer_tok_s = None if peer is None else peer["tok_s"]
    return {
        "command": "decode", "model": options.store.index.name, "experts_format": facts.experts_format,
        "dense_format": facts.dense_format, "device": facts.device,
        "pairs": options.pairs, "prompt": options.prompt, "tokens": options.tokens, "policy": facts.policy,
        "numerics": facts.numerics, "fallbacks": facts.fallbacks, "experts_total_bytes": facts.experts_total,
        "link_copy_bytes_per_s": link.copy, "link_kernel_bytes_per_s": link.kernel,
        "card_memory_bytes_per_s": link.memory, "vram_peak_bytes": vram, "cells": tables, "peer": peer,
        "peer_tok_s": peer_tok_s, "ratio": first["tok_s"] / peer_tok_s if peer_tok_s else None,
        **{name: first[name] for name in ("tok_s", "resident_tok_s", "bound_tok_s", "serial_tok_s", "hit_ratio",
                                          "transferred_bytes_per_token", "peak_bytes")},
    }  # fmt: skip


def _misses(tiers: Tiers) -> dict[str, Any]:
    return {
        "misses": tiers.misses, "cpu_bytes_per_s": tiers.cpu_bytes_per_s, "computed_experts": tiers.computed,
        "computed_bytes": tiers.computed_bytes, "shared_bytes": tiers.link_bytes["shared"],
        "shared": None if tiers.shared is None else msgspec.structs.asdict(tiers.shared),
    }  # fmt: skip


def _title(options: Options, facts: EngineFacts) -> str:
    return (
        f"decode: {options.store.index.name}, experts {facts.experts_format}, dense {facts.dense_format}, "
        f"policy {facts.policy}; {facts.device}; {options.pairs} runs of {options.tokens} tokens a cell"
    )


def _row(one: dict[str, Any]) -> list[str]:
    speed = one["tok_s_interval"]
    return [
        one["expert_budget"], one["routing"], one["hints"], str(one["streams"]), number(one["tok_s"], 1),
        spread(speed["low"], speed["high"], 1), number(1000 * one["step_s"], 3),
        *(percent(one[name]) for name in ("resident_share", "bound_share", "serial_share", "link_share")),
        percent(one["hit_ratio"]), percent(one["late_ratio"]), number(one["transferred_bytes_per_token"] / 1e6, 1),
        number(one["lru_transferred_bytes_per_token"] / 1e6, 1), number(one["experts_per_layer"], 1),
    ]  # fmt: skip


def _notes(facts: EngineFacts, values: dict[str, Any]) -> list[str]:
    link = f"copies {values['link_copy_bytes_per_s'] / 1e9:.1f}, kernels {values['link_kernel_bytes_per_s'] / 1e9:.1f}"
    notes = [f"fallback: {fallback}" for fallback in facts.fallbacks]
    notes.append(
        f"link: {link} GB/s; card's memory {values['card_memory_bytes_per_s'] / 1e9:.0f} GB/s; at most "
        f"{values['vram_peak_bytes'] / 2**30:.2f} GiB of the card in use"
    )
    if values["misses"] != "link":
        who = "the processor" if values["misses"] == "cpu" else "link and processor at once"
        notes.append(
            f"misses are computed by {who}; the processor: {values['cpu_bytes_per_s'] / 1e9:.1f} GB/s as measured at "
            f"start, {values['computed_bytes'] / 1e9:.1f} GB so far; of those that both computed a part of, "
            f"{values['shared_bytes'] / 1e9:.1f} GB were read"
        )
    if (shared := values["shared"]) is not None:
        left = " ".join(f"{one:.2f}" for one in shared["left"])
        notes.append(
            f"they share {'now' if shared['is_on'] else 'no more'} as if the processor computed "
            f"{shared['cpu_bytes_per_s'] / 1e9:.1f} GB/s; it was later in {shared['later']} layers, earlier in "
            f"{shared['earlier']}; left to it of 1, 2, … missing experts: {left}; sharing was tried {shared['trials']} "
            f"times, changed {shared['switches']} times"
        )
    if values["peer"] is not None:
        peer = values["peer"]
        speeds = ", ".join(f"{name} {speed}" for name, speed in peer["implementations"].items())
        notes.append(f"{peer['version']}: {speeds} tok/s; all resident ÷ its best: {values['ratio'] or 0:.1f}")
    return [*notes, ""]
