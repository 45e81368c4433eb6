"""`expertd bench prefill`: seconds to a prompt's first token, alone and beside a running decode."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import Any

from expertd_engine.bench.decode import DISK_S
from expertd_engine.bench.options import Options
from expertd_engine.bench.protocol import DescribeRequest, DiskRead, DiskRequest, EngineFacts, Prefilled, PrefillRequest
from expertd_engine.bench.race import Runner, enter, paired, race
from expertd_engine.bench.report import finish, mebibytes, number, spread
from expertd_engine.bench.stats import median_interval, ratio_interval, settled_after

HEADER = (
    "run",
    "tok/s",
    "TTFT s",
    "95 %",
    "read",
    "expert peak",
    "process peak",
    "pace before",
    "worst gap",
    "pace back",
)


def prefill(options: Options) -> str:
    """Run it; the report."""
    with ExitStack() as stack:
        ours = Runner[Prefilled]("ours", stack.enter_context(options.ours()), PrefillRequest(options.prompt))
        facts = ours.contender.ask(DescribeRequest(), EngineFacts)
        beside = PrefillRequest(options.prompt, decode=True, warm=options.warm, after=options.tokens)
        lines = [ours, Runner[Prefilled]("beside a decode", ours.contender, beside)]
        if facts.expert_budget < facts.experts_total:
            lines.append(Runner("all resident", options.unlimited(), ours.request))
        others = [("versus", options.variant()), ("llama.cpp", options.peer_contender())]
        lines += [Runner[Prefilled](name, one, PrefillRequest(options.prompt)) for name, one in others if one]
        enter(stack, [line for line in lines if line.contender is not ours.contender])
        disk: list[DiskRead] = []
        race(lines, options.pairs, Prefilled, lambda: disk.append(ours.contender.ask(DiskRequest(DISK_S), DiskRead)))
    values = _values(options, facts, lines, disk)
    return finish(
        _title(options, facts), HEADER, [_row(options, line) for line in lines], _notes(facts, values), values
    )


def _values(
    options: Options, facts: EngineFacts, lines: list[Runner[Prefilled]], disk: list[DiskRead]
) -> dict[str, Any]:
    by_name = {line.name: line for line in lines}
    ours = by_name["ours"]
    resident = by_name.get("all resident", ours)
    engine = options.engine
    values: dict[str, Any] = {
        "command": "prefill", "model": options.store.index.name, "experts_format": facts.experts_format,
        "dense_format": facts.dense_format, "device": facts.device, "pairs": options.pairs, "prompt": options.prompt,
        "routing": engine.routing, "hints": engine.hints, "policy": facts.policy,
        "expert_budget_bytes": facts.expert_budget, "experts_total_bytes": facts.experts_total,
        "fallbacks": facts.fallbacks, "lost": {line.name: line.lost for line in lines if line.lost},
    }  # fmt: skip
    if not (ours.samples and resident.samples):
        return values
    ttft_s, compute_s = (median(sample.ttft_s for sample in line.samples) for line in (ours, resident))
    speed = median(read.bytes_per_s for read in disk)
    missing = median(facts.experts_total - sample.resident_bytes for sample in ours.samples)
    values |= {
        "ttft_s": ttft_s, "resident_ttft_s": compute_s, "pass_s": missing / speed, "disk_bytes_per_s": speed,
        "limit_share": ttft_s / max(compute_s, missing / speed), "tok_s": options.prompt / ttft_s,
        "resident_tok_s": options.prompt / compute_s, "bound_tok_s": options.prompt / max(compute_s, missing / speed),
        "serial_tok_s": options.prompt / (compute_s + missing / speed),
        "transferred_bytes_per_token": median(s.transferred_bytes for s in ours.samples) / options.prompt,
        "peak_bytes": ours.samples[-1].peak_bytes, "process_peak_bytes": ours.samples[-1].process_peak_bytes,
    }  # fmt: skip
    return values | _peer(options, ours, by_name.get("llama.cpp")) | _beside(by_name["beside a decode"])


def _peer(options: Options, ours: Runner[Prefilled], peer: Runner[Prefilled] | None) -> dict[str, Any]:
    if peer is None or not peer.samples:
        return {}
    mine, theirs = paired(ours, peer)
    ratio = ratio_interval([1 / sample.ttft_s for sample in mine], [1 / sample.ttft_s for sample in theirs])
    speed = options.prompt / median(sample.ttft_s for sample in peer.samples)
    return {"peer_tok_s": speed, "ratio": ratio.median, "peer_ratio": ratio.as_json()}


def _beside(line: Runner[Prefilled]) -> dict[str, Any]:
    """How a running decode fared: its pace before, its longest wait, and after how many tokens its pace was back."""
    if not line.samples:
        return {}
    settled = [settled_after(sample.after_s, median(sample.before_s)) for sample in line.samples]
    known = [tokens for tokens in settled if tokens is not None]
    return {
        "beside_ttft_s": median(sample.ttft_s for sample in line.samples),
        "decode_before_s": median(median(sample.before_s) for sample in line.samples),
        "decode_worst_gap_s": median(max(sample.during_s) for sample in line.samples),
        "decode_settled_after": median(known) if len(known) == len(settled) else None,
    }


def _title(options: Options, facts: EngineFacts) -> str:
    return (
        f"prefill: {options.store.index.name}, experts {facts.experts_format}, dense {facts.dense_format}, a prompt of "
        f"{options.prompt} tokens, {facts.expert_budget / facts.experts_total:.0%} of experts, routing "
        f"{options.engine.routing}; {facts.device}; {options.pairs} pairs"
    )


def _row(options: Options, line: Runner[Prefilled]) -> list[str]:
    if not line.samples:
        return [line.name, line.lost or "–", *["–"] * (len(HEADER) - 2)]
    ttft = median_interval([sample.ttft_s for sample in line.samples])
    last = line.samples[-1]
    beside = _beside(line) if last.before_s else {}
    settled = beside.get("decode_settled_after")
    return [
        f"{line.name} (then {line.lost})" if line.lost else line.name,
        number(options.prompt / ttft.median), number(ttft.median, 3), spread(ttft.low, ttft.high, 3),
        mebibytes(median(sample.transferred_bytes for sample in line.samples)), mebibytes(last.peak_bytes or None),
        mebibytes(last.process_peak_bytes),
        f"{1000 * beside['decode_before_s']:.1f} ms" if beside else "–",
        f"{1000 * beside['decode_worst_gap_s']:.1f} ms" if beside else "–",
        "–" if not beside else "not seen" if settled is None else f"{settled:.0f} tokens",
    ]  # fmt: skip


def _notes(facts: EngineFacts, values: dict[str, Any]) -> list[str]:
    notes = [f"fallback: {fallback}" for fallback in facts.fallbacks]
    if "pass_s" in values:
        notes.append(
            f"one pass over the missing experts {values['pass_s']:.3f} s "
            f"at {values['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
            f"compute {values['resident_ttft_s']:.3f} s: TTFT is {values['limit_share']:.2f} × the larger"
        )
    if values.get("ratio") is not None:
        notes.append(f"ours / llama.cpp: {values['ratio']:.3f}")
    return [*notes, ""]
