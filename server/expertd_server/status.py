"""What an operator reads at one glance: state, budgets, work, experts. Made of numbers at hand."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec

from expertd_engine.messages import EngineInfo
from expertd_engine.snapshot import Snapshot, Tiers
from expertd_server import __version__
from expertd_server.engine_families import Labels
from expertd_server.engine_metrics import EngineCounters, memory_budget_of
from expertd_server.service import Service


def status(service: Service) -> dict[str, Any]:
    """The body of GET /status. Counters go on over engine restarts, gauges are those of the engine that serves."""
    body: dict[str, Any] = {
        "status": service.state,
        "version": __version__,
        "uptime_s": round(time.monotonic() - service.began_s, 1),
        "snapshot_age_s": _age(service.metrics.engine.snapshot_age_s()),
        "requests": _requests(service),
        "tokens": {
            "prompt": _total(service, "expertd_prompt_tokens_total"),
            "generated": _total(service, "expertd_generation_tokens_total"),
        },
        "experts": experts(service.metrics.engine),
        "engine": _engine(service),
    }
    if service.state in ("loading", "engine_dead"):
        body |= {"stage": service.stage, "progress": round(service.progress, 4)}
    if service.model is not None:
        body["model"] = {**_model(service.model.name, service.model.info), "chat": service.model.chat.available}
        snapshot = service.metrics.engine.snapshot
        body["memory"] = memory(snapshot, service.model.info)
        body["foresight"] = foresight(snapshot)
        if snapshot.tiers is not None:
            body["tiers"] = tiers(snapshot.tiers)
        body["store"] = {"swept": snapshot.records_swept, "bad": snapshot.records_bad}
    return body


def _age(seconds: float) -> float | None:
    return None if seconds == float("inf") else round(seconds, 3)


def _total(service: Service, sample: str) -> float:
    return service.metrics.registry.get_sample_value(sample) or 0.0


def _requests(service: Service) -> dict[str, Any]:
    snapshot = service.metrics.engine.snapshot
    return {
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "admitted": service.admission.used,
        "capacity": service.admission.capacity,
        "queued_prompt_tokens": service.admission.queued_tokens,
        "preemptions": snapshot.preemptions,
    }


def _engine(service: Service) -> dict[str, Any]:
    """How often an engine had to be started again, and how the last one ended."""
    if service.last_failure is None:
        return {"restarts": service.failures, "last_failure": None}
    when_s, reason, how = service.last_failure
    ago_s = round(time.monotonic() - when_s, 1)
    return {"restarts": service.failures, "last_failure": {"reason": reason, "how": how, "ago_s": ago_s}}


def _model(name: str, info: EngineInfo) -> dict[str, Any]:
    return {
        "name": name, "dtype": info.dtype, "layers": info.num_moe_layers, "experts": info.num_experts,
        "top_k": info.top_k, "numerics": info.numerics, "kernels": info.kernels,
        "step_path": info.step_path, "device": info.device, "policy": info.policy, "lookahead": info.lookahead,
        "fallbacks": info.fallbacks,
    }  # fmt: skip


def memory(snapshot: Snapshot, info: EngineInfo) -> dict[str, Any]:
    """Bytes: the expert budget and what fills it, keys and values, and everything together as the kernel counts it."""
    return {
        "experts": {
            "budget": snapshot.expert_budget_bytes, "limit": snapshot.expert_limit_bytes,
            "resident": snapshot.resident_bytes, "loading": snapshot.loading_bytes, "peak": snapshot.peak_expert_bytes,
            "minimum": info.minimum_expert_budget_bytes, "maximum": info.maximum_expert_budget_bytes,
            "all": info.expert_bytes_total,
        },
        "kv": {
            "capacity": snapshot.kv_capacity_bytes, "used": snapshot.kv_used_bytes, "cached": snapshot.kv_cached_bytes,
        },
        "dense": snapshot.dense_bytes,
        "total": {
            "budget": memory_budget_of(info, snapshot), "used": snapshot.memory_used_bytes,
            "peak": snapshot.memory_peak_bytes, "source": snapshot.memory_source, "shrinks": snapshot.memory_shrinks,
        },
        "pressure": {
            "stalled": snapshot.pressure_stalled, "lent": snapshot.pressure_lent_bytes,
            "shrinks": snapshot.pressure_shrinks,
        },
    }  # fmt: skip


def tiers(found: Tiers) -> dict[str, Any]:
    """Where a card's experts are, and what crossed its link since the engine started."""
    bandwidth = None if math.isinf(found.link_bytes_per_s) else found.link_bytes_per_s
    return {
        "device": {
            "bytes": found.device_bytes, "slots": found.slots, "resident": found.resident,
            "set_aside": found.set_aside,
        },
        "host": {"bytes": found.host_bytes, "pinned": found.host_pinned},
        "link": {
            "bytes": found.link_bytes, "bytes_per_s": bandwidth, "copies": found.copies,
            "duplicates": found.duplicates, "layer_waits": found.layer_waits,
        },
        "misses": {
            "by": found.misses, "cpu_bytes_per_s": found.cpu_bytes_per_s or None, "computed": found.computed,
            "computed_bytes": found.computed_bytes,
            "shared": None if found.shared is None else msgspec.structs.asdict(found.shared),
        },
        "steps": {"ahead": found.steps_ahead, "in_vain": found.steps_in_vain},
    }  # fmt: skip


def foresight(snapshot: Snapshot) -> dict[str, Any]:
    """What came of predictions, by layers ahead, since the engine started; and what knowing the future would hit of
    the lookups that are sampled for that."""
    found, sampled = snapshot.foresight, max(1, snapshot.foresight.sampled_lookups)
    return {
        "on": found.is_on, "trials": found.trials, "switches": found.switches,
        "leads": [msgspec.structs.asdict(lead) for lead in found.leads],
        "sampled": {
            "lookups": found.sampled_lookups, "hit_ratio": found.sampled_hits / sampled,
            "clairvoyant_ratio": found.clairvoyant_hits / sampled,
        },
        "trace": {"rows": found.trace_rows, "failure": found.trace_failure},
    }  # fmt: skip


def experts(counters: EngineCounters) -> dict[str, float]:
    """Sums over layers, since the server started. `hit_ratio` is *the* hit rate: distinct lookups that found their
    expert resident, of all; 0 before the first."""
    sums: dict[str, float] = {}
    for (name, labels), value in counters.totals().items():
        key = _experts_key(name, labels)
        if key is not None:
            sums[key] = sums.get(key, 0) + value
    lookups = sum(sums.get(result, 0) for result in ("hit", "late", "miss"))
    return {"hit_ratio": sums.get("hit", 0) / lookups if lookups else 0.0, "lookups": lookups, **sums}


def _experts_key(counter: str, labels: Labels) -> str | None:
    """Under what name a counter's series is told, the last of its labels being the outcome; None: not at all."""
    match counter:
        case "expert_lookups" | "expert_lookahead_experts":
            return labels[-1]
        case "expert_prefetch":
            return f"prefetch_{labels[-1]}"
        case "stall_seconds":
            return "stall_s"
        case "store_read_bytes":
            return "read_bytes"
    return None
