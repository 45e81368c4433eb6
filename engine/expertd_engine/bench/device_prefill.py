"""`expertd bench prefill --device cuda`: time to a prompt's first token by budget, alone and beside a decode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

from expertd_engine.bench.device_decode import ALL, Cell
from expertd_engine.bench.device_session import DeviceSession
from expertd_engine.bench.link import measure_link
from expertd_engine.bench.options import Options
from expertd_engine.bench.protocol import EngineFacts, Prefilled, PrefillRequest
from expertd_engine.bench.report import finish, number, spread
from expertd_engine.bench.stats import median_interval, settled_after

HEADER = (
    "experts", "routes", "tok/s", "TTFT ms", "95 %", "of limit", "MB over the link", "pace before", "worst gap",
    "pace back",
)  # fmt: skip


def device_prefill(options: Options, cells: Sequence[Cell]) -> str:
    """Run it; the report. Hints play no part: a prompt's experts are streamed in."""
    with closing(DeviceSession(options.engine)) as session:
        return prefill_report(session, options, cells)


def prefill_report(session: DeviceSession, options: Options, cells: Sequence[Cell]) -> str:
    """The cells, after one with all experts resident."""
    facts = session.describe()
    link = measure_link(facts.record)
    wanted = [replace(cells[0], budget=ALL), *(cell for cell in cells if cell.budget != ALL)]
    found = [_samples(session, cell, options) for cell in wanted]
    resident_s = median(sample.ttft_s for sample in found[0][0])
    tables = [
        _values(options, facts, cell, samples, resident_s, link.copy)
        for cell, samples in zip(wanted, found, strict=True)
    ]
    values = {
        "command": "prefill", "model": options.store.index.name, "experts_format": facts.experts_format,
        "dense_format": facts.dense_format, "device": facts.device, "pairs": options.pairs, "prompt": options.prompt,
        "link_copy_bytes_per_s": link.copy, "cells": tables, "tok_s": tables[0]["tok_s"],
        "resident_tok_s": options.prompt / resident_s, "fallbacks": facts.fallbacks,
    }  # fmt: skip
    title = (
        f"prefill: {options.store.index.name}, experts {facts.experts_format}, dense {facts.dense_format}, a prompt of "
        f"{options.prompt} tokens; {facts.device}; {options.pairs} runs a cell"
    )
    notes = [*(f"fallback: {one}" for one in facts.fallbacks), f"link: copies {link.copy / 1e9:.1f} GB/s", ""]
    return finish(title, HEADER, [_row(one) for one in tables], notes, values)


def _samples(session: DeviceSession, cell: Cell, options: Options) -> tuple[list[Prefilled], list[Prefilled]]:
    """Prompts alone, and beside a decode. The first compiles, settles what is resident, and does not count."""
    session.retune(cell.budget, cell.routing, "none", 1)
    alone = PrefillRequest(options.prompt)
    beside = PrefillRequest(options.prompt, decode=True, warm=options.warm, after=options.tokens)
    session.prefill(alone)
    return (
        [session.prefill(alone) for _ in range(options.pairs)],
        [session.prefill(beside) for _ in range(options.pairs)],
    )


def _values(
    options: Options, facts: EngineFacts, cell: Cell, samples: Sequence[Sequence[Prefilled]], resident_s: float,
    link: float,
) -> dict[str, Any]:  # fmt: skip
    alone, beside = samples
    ttft = median_interval([sample.ttft_s for sample in alone])
    missing = median(facts.experts_total - sample.resident_bytes for sample in alone)
    limit_s = max(resident_s, missing / link)
    settled = [settled_after(sample.after_s, median(sample.before_s)) for sample in beside]
    known = [tokens for tokens in settled if tokens is not None]
    return {
        "expert_budget": cell.budget, "routing": cell.routing, "tok_s": options.prompt / ttft.median,
        "ttft_s": ttft.median, "ttft_interval": ttft.as_json(), "pass_s": missing / link,
        "limit_share": ttft.median / limit_s, "transferred_bytes": median(s.transferred_bytes for s in alone),
        "decode_before_s": median(median(sample.before_s) for sample in beside),
        "decode_worst_gap_s": median(max(sample.during_s) for sample in beside),
        "decode_settled_after": median(known) if len(known) == len(settled) else None,
    }  # fmt: skip


def _row(one: dict[str, Any]) -> list[str]:
    interval, settled = one["ttft_interval"], one["decode_settled_after"]
    return [
        one["expert_budget"], one["routing"], number(one["tok_s"], 0), number(1000 * one["ttft_s"], 1),
        spread(1000 * interval["low"], 1000 * interval["high"], 1), f"{one['limit_share']:.2f} ×",
        number(one["transferred_bytes"] / 1e6, 0), f"{1000 * one['decode_before_s']:.2f} ms",
        f"{1000 * one['decode_worst_gap_s']:.1f} ms", "not seen" if settled is None else f"{settled:.0f} tokens",
    ]  # fmt: skip
