"""`expertd bench decode`: tokens a second under a budget, beside all experts resident, a variant, and a peer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from expertd_engine.bench.disk import memory_bandwidth
from expertd_engine.bench.options import Options
from expertd_engine.bench.protocol import Decoded, DecodeRequest, DescribeRequest, DiskRead, DiskRequest, EngineFacts
from expertd_engine.bench.race import Runner, enter, paired, race
from expertd_engine.bench.report import finish, mebibytes, number, percent, spread
from expertd_engine.bench.stats import Interval, bound_tok_s, median_interval, ratio_interval, serial_tok_s

DISK_S = 0.7
HEADER = (
    "run", "tok/s", "95 %", "ms/token", "weights GB/s", "hits", "late", "read/token", "LRU reads", "stall ms",
    "experts/layer", "expert peak", "process peak",
)  # fmt: skip


@dataclass(slots=True)
class _Run:
    """The lines of the table, and what is known beside them."""

    facts: EngineFacts
    ours: Runner[Decoded]
    resident: Runner[Decoded]
    """`ours` itself where the budget holds every expert."""
    versus: Runner[Decoded] | None
    peer: Runner[Decoded] | None
    disk: list[DiskRead]
    memory: list[float]
    """Bytes a second that the cores can read."""

    @property
    def lines(self) -> list[Runner[Decoded]]:
        found = [self.ours, self.resident, self.versus, self.peer]
        return [line for i, line in enumerate(found) if line is not None and line not in found[:i]]


def decode(options: Options) -> str:
    """Run it; the report. Raises what starting an engine raises, and Lost if ours is lost before its first sample."""
    with ExitStack() as stack:
        run = _prepare(options, stack)
        budgeted = run.facts.expert_budget < run.facts.experts_total

        def between() -> None:
            run.memory.append(memory_bandwidth(options.threads))
            if budgeted and run.ours.lost is None:
                run.disk.append(run.ours.contender.ask(DiskRequest(DISK_S), DiskRead))

        race(run.lines, options.pairs, Decoded, between)
        kills = {line.name: line.contender.kills for line in run.lines}
        peaks = {line.name: line.contender.cgroup_peak_bytes for line in run.lines}
    values = _values(options, run) | ({"oom_kill": kills, "cgroup_peak_bytes": peaks} if options.cgroup else {})
    return finish(
        _title(options, run.facts),
        HEADER,
        [_row(options, run.facts, line) for line in run.lines],
        _notes(run, values),
        values,
    )


def _prepare(options: Options, stack: ExitStack) -> _Run:
    """Start everyone, each in a process of its own: so their memory can be told apart.

    What holds all experts with and without the budget is one run, not two.
    """
    request = DecodeRequest(options.tokens, options.warm, options.prompt)
    ours = Runner[Decoded]("ours", stack.enter_context(options.ours()), request)
    facts = ours.contender.ask(DescribeRequest(), EngineFacts)
    resident = ours
    if facts.expert_budget < facts.experts_total:
        resident = Runner[Decoded]("all resident", options.unlimited(), request)
    others = [("versus", options.variant()), ("llama.cpp", options.peer_contender())]
    versus, peer = (Runner[Decoded](name, one, request) if one else None for name, one in others)
    newcomers = [line for line in (resident, versus, peer) if line and line.contender is not ours.contender]
    enter(stack, newcomers)
    return _Run(facts, ours, resident, versus, peer, [], [])


def _values(options: Options, run: _Run) -> dict[str, Any]:
    engine, facts = options.engine, run.facts
    values: dict[str, Any] = {
        "command": "decode", "model": options.store.index.name, "experts_format": facts.experts_format,
        "dense_format": facts.dense_format, "device": facts.device, "streams": engine.streams, "pairs": options.pairs,
        "prompt": options.prompt, "tokens": options.tokens, "routing": engine.routing, "hints": engine.hints,
        "policy": facts.policy, "lookahead": facts.lookahead, "prefetch": engine.prefetch,
        "expert_budget_bytes": facts.expert_budget, "experts_total_bytes": facts.experts_total,
        "numerics": facts.numerics, "fallbacks": facts.fallbacks,
        "lost": {line.name: line.lost for line in run.lines if line.lost},
    }  # fmt: skip
    if run.ours.samples:
        values |= _ours(run.ours.samples) | _against(run) | _memory(options, run)
    if run.disk:
        values["disk_bytes_per_s"] = median(read.bytes_per_s for read in run.disk)
    return values | _limits(values)


def _ours(samples: list[Decoded]) -> dict[str, Any]:
    tokens = sum(sample.tokens for sample in samples)
    lookups = sum(sample.lookups for sample in samples)
    return {
        "tok_s": median(sample.tok_s for sample in samples),
        "tok_s_interval": median_interval([sample.tok_s for sample in samples]).as_json(),
        "hit_ratio": sum(sample.hits for sample in samples) / max(1, lookups),
        "late_ratio": sum(sample.late for sample in samples) / max(1, lookups),
        "transferred_bytes_per_token": sum(sample.transferred_bytes for sample in samples) / tokens,
        "missed_bytes_per_token": sum(sample.missed_bytes for sample in samples) / tokens,
        "lru_transferred_bytes_per_token": sum(sample.lru_transferred_bytes for sample in samples) / tokens,
        "stall_s_per_token": sum(sample.stall_s for sample in samples) / tokens,
        "experts_per_layer": median(sample.union for sample in samples),
        "peak_bytes": samples[-1].peak_bytes,
        "process_peak_bytes": samples[-1].process_peak_bytes,
    }


def _memory(options: Options, run: _Run) -> dict[str, Any]:
    """How near the resident run comes to reading its weights as fast as memory gives them."""
    if not run.resident.samples:
        return {}
    bytes_per_token = _weight_bytes(options, run.facts, run.resident.samples)
    memory = median(run.memory)
    speed = median(sample.tok_s for sample in run.resident.samples)
    return {
        "weight_bytes_per_token": bytes_per_token,
        "memory_bytes_per_s": memory,
        "memory_bound_tok_s": memory / bytes_per_token,
        "memory_share": speed * bytes_per_token / memory,
    }


def _weight_bytes(options: Options, facts: EngineFacts, samples: list[Decoded]) -> float:
    """Weights that a token reads: the dense ones and its step's experts, shared by the streams."""
    union = median(sample.union for sample in samples) or facts.top_k
    return (facts.dense_read + union * facts.layers * facts.record) / options.engine.streams


def _against(run: _Run) -> dict[str, Any]:
    """Speeds of the others, and ours over theirs within pairs."""
    values: dict[str, Any] = {}
    for key, other in (("resident", run.resident), ("versus", run.versus), ("peer", run.peer)):
        if other is not None and other.samples:
            mine, theirs = paired(run.ours, other)
            ratio = ratio_interval([sample.tok_s for sample in mine], [sample.tok_s for sample in theirs])
            values[f"{key}_tok_s"] = median(sample.tok_s for sample in other.samples)
            values[f"{key}_ratio"] = ratio.as_json()
    if "peer_ratio" in values:
        values["ratio"] = values["peer_ratio"]["median"]
    return values


def _limits(values: dict[str, Any]) -> dict[str, Any]:
    """What the budget allows: see `stats`. Without transfers both limits are the resident speed."""
    resident = values.get("resident_tok_s")
    if resident is None or "tok_s" not in values:
        return {}
    disk = values.get("disk_bytes_per_s", float("inf"))
    bound = bound_tok_s(resident, values["transferred_bytes_per_token"], disk)
    serial = serial_tok_s(resident, values["missed_bytes_per_token"], disk)
    lru = values["lru_transferred_bytes_per_token"]
    return {
        "bound_tok_s": bound,
        "serial_tok_s": serial,
        "bound_share": values["tok_s"] / bound,
        "serial_share": values["tok_s"] / serial,
        "resident_share": values["resident_ratio"]["median"],
        "lru_share": values["transferred_bytes_per_token"] / lru if lru else None,
    }


def _title(options: Options, facts: EngineFacts) -> str:
    engine = options.engine
    share = facts.expert_budget / facts.experts_total
    return (
        f"decode: {options.store.index.name}, experts {facts.experts_format}, dense {facts.dense_format}, "
        f"{share:.0%} of experts, {engine.streams} streams, routing {engine.routing}, hints {engine.hints}, "
        f"policy {facts.policy}; {facts.device}; {options.pairs} pairs of {options.tokens} tokens"
    )


def _row(options: Options, facts: EngineFacts, line: Runner[Decoded]) -> list[str]:
    if not line.samples:
        return [line.name, line.lost or "–", *["–"] * (len(HEADER) - 2)]
    samples = line.samples
    speed = median_interval([sample.tok_s for sample in samples])
    own = _ours(samples)
    is_engine = own["peak_bytes"] > 0
    knows_union = is_engine or options.engine.streams == 1
    read = speed.median * _weight_bytes(options, facts, samples) / 1e9 if knows_union else None
    figures = [
        percent(own["hit_ratio"]), percent(own["late_ratio"]), mebibytes(own["transferred_bytes_per_token"]),
        mebibytes(own["lru_transferred_bytes_per_token"]), number(1000 * own["stall_s_per_token"]),
        number(own["experts_per_layer"], 1), mebibytes(own["peak_bytes"]),
    ]  # fmt: skip
    return [
        f"{line.name} (then {line.lost})" if line.lost else line.name,
        number(speed.median), spread(speed.low, speed.high), number(1000 / speed.median), number(read),
        *(figures if is_engine else ["–"] * len(figures)), mebibytes(own["process_peak_bytes"]),
    ]  # fmt: skip


def _notes(run: _Run, values: dict[str, Any]) -> list[str]:
    notes = [f"fallback: {fallback}" for fallback in run.facts.fallbacks]
    if run.disk:
        kind = "direct" if run.disk[0].direct else "through the page cache"
        notes.append(f"disk {values['disk_bytes_per_s'] / 1e9:.2f} GB/s ({kind}, {run.disk[0].threads} threads)")
    if "memory_share" in values:
        notes.append(
            f"memory {values['memory_bytes_per_s'] / 1e9:.1f} GB/s; {mebibytes(values['weight_bytes_per_token'])} of "
            f"weights a token: at most {values['memory_bound_tok_s']:.2f} tok/s ({values['memory_share']:.1%} reached)"
        )
    if "bound_tok_s" in values:
        notes.append(
            f"bound {values['bound_tok_s']:.2f} tok/s ({values['bound_share']:.1%} reached), "
            f"serial {values['serial_tok_s']:.2f} tok/s ({values['serial_share']:.1%}), "
            f"resident {values['resident_tok_s']:.2f} tok/s ({values['resident_share']:.1%})"
        )
    if values.get("lru_share") is not None:
        notes.append(f"bytes read: {values['lru_share']:.2f} × those of an LRU cache on the same routes")
    for key, name in (("peer_ratio", "llama.cpp"), ("versus_ratio", "versus")):
        if key in values:
            ratio = Interval(**values[key])
            notes.append(f"ours / {name}: {ratio.median:.3f} (95 %: {spread(ratio.low, ratio.high, 3)})")
    for name in values.get("oom_kill") or {}:
        peak = values["cgroup_peak_bytes"][name]
        if peak is not None:
            notes.append(f"cgroup of {name}: {values['oom_kill'][name]} kills, {mebibytes(peak)} charged at most")
    return [*notes, ""]
