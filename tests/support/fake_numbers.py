"""What an engine that is not there says of itself, and the numbers that it shows after so many steps."""

from __future__ import annotations

import msgspec

from expertd_engine.messages import PROTOCOL_VERSION, EngineInfo
from expertd_engine.snapshot import HistogramData, LayerLookups, Snapshot, VirtualLayer
from support.fake_store import END, MAX_MODEL_LEN, VOCAB_SIZE


def engine_info(**changes: object) -> EngineInfo:
    info = EngineInfo(
        protocol=PROTOCOL_VERSION, pid=1, model_type="mixtral", store_path="/nowhere/secret", store_id="0" * 64,
        dtype="float32", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, max_sequences=8, max_step_tokens=64,
        eos_token_ids=[END], num_moe_layers=2, num_experts=4, top_k=2, expert_record_bytes=4096,
        expert_bytes_total=32768, expert_budget_bytes=16384, minimum_expert_budget_bytes=8192,
        maximum_expert_budget_bytes=32768,
        memory_budget_bytes=None, kv_block_tokens=16, kv_blocks=32, kv_bytes=65536, policy="lru", lookahead="none",
        prefetch=True, numerics="invariant", kernels="avx2", step_path="native",
        direct_io=True, fallbacks=["direct I/O was refused"], torch_version="0",
        transformers_version="0",
    )  # fmt: skip
    return msgspec.structs.replace(info, **changes)


def snapshot(steps: int, waiting: int = 0, running: int = 0, budget: int = 16384) -> Snapshot:
    """Counters of an engine after `steps` steps: one hit, one miss and one prefetch each."""
    bounds = [0.001, 0.01]
    histogram = HistogramData(bounds, [steps, 0, 0], 0.0005 * steps)
    empty = HistogramData(bounds, [0, 0, 0], 0.0)
    return Snapshot(
        time_s=0.0, lookups=[LayerLookups(steps, 0, steps, steps, 3 * steps, 0, steps)] * 2, demand_loads=steps,
        demand_bytes=4096 * steps, prefetch_loads=steps, prefetch_bytes=4096 * steps, read_bytes=8192 * steps,
        prefetch_issued=steps, prefetch_used=steps,
        prefetch_late=0, prefetch_wasted=0, prefetch_cancelled=0, prefetch_pending=0,
        prefetch_outcome_bytes={"used": 4096 * steps, "late": 0, "wasted": 0, "cancelled": 0}, load_queue=0,
        load_seconds=0.5 * steps, cpu_seconds=0.1 * steps,
        load_failures=0, records_swept=steps, records_bad=[],
        stall_seconds={"disk_read": 0.25 * steps, "expert_wait": 0.0},
        step_stall_seconds={"disk_read": histogram, "expert_wait": empty},
        evictions={"capacity": steps, "budget_change": 0},
        expert_budget_bytes=budget, expert_limit_bytes=budget, resident_bytes=8192, loading_bytes=4096,
        peak_expert_bytes=12288, residents_by_layer=[1, 1], memory_used_bytes=1, memory_peak_bytes=2,
        memory_source="process", memory_budget_bytes=None, memory_shrinks=0, pressure_stalled=0.0,
        pressure_lent_bytes=0, pressure_shrinks=0, dense_bytes=100,
        kv_capacity_bytes=65536, kv_used_bytes=0,
        kv_cached_bytes=4096, prefix_cache_queries=10 * steps, prefix_cache_hits=4 * steps, kv_cache_evictions=steps,
        running=running,
        waiting=waiting, preemptions=0, steps={"prefill": 0, "decode": steps},
        step_seconds={"prefill": empty, "decode": histogram}, step_tokens={"prefill": empty, "decode": histogram},
        load_latency_seconds=histogram, virtual=[VirtualLayer(4 * steps, steps, 0.125 * steps, steps, 2)] * 2,
        virtual_tokens=2 * steps,
    )  # fmt: skip
