"""What a started engine says of itself, whatever computes its steps. Made once, at the end of start-up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import transformers

from expertd_engine.config import Config
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import PROTOCOL_VERSION, EngineInfo
from expertd_engine.model.loader import LoadedModel
from expertd_engine.planning.startup_plan import StartupPlan

if TYPE_CHECKING:
    from expertd_engine.experts.device_cache import DeviceCache


class _KVBytes(Protocol):
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What was allotted."""

    plan: StartupPlan
    cache: ExpertCache | DeviceCache
    pool: KVPool
    storage: _KVBytes
    records: RecordFile


@dataclass(frozen=True, slots=True)
class How:
    """How steps are computed; `EngineInfo` says what each means."""

    max_model_len: int
    policy: str
    numerics: str
    kernels: str
    step_path: str
    fallbacks: list[str]
    device: str = "cpu"


def describe(config: Config, store: ExpertStore, loaded: LoadedModel, parts: Parts, how: How) -> EngineInfo:
    """What the server is told, and through it everybody who asks."""
    index, plan = store.index, parts.plan
    return EngineInfo(
        protocol=PROTOCOL_VERSION,
        pid=os.getpid(),
        model_type=index.model_type,
        store_path=str(store.path),
        store_id=index.store_id,
        dtype=index.experts_format,
        vocab_size=loaded.vocab_size,
        max_model_len=how.max_model_len,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        eos_token_ids=list(loaded.eos_token_ids),
        num_moe_layers=len(index.layers),
        num_experts=max(layer.num_experts for layer in index.layers),
        top_k=index.top_k,
        expert_record_bytes=max(layout.bytes for layout in index.layouts),
        expert_bytes_total=index.expert_bytes_total(),
        expert_budget_bytes=plan.expert_budget_bytes,
        minimum_expert_budget_bytes=parts.cache.ledger.minimum_bytes,
        maximum_expert_budget_bytes=index.expert_bytes_total()
        if plan.memory_budget_bytes is None
        else plan.expert_budget_bytes,
        memory_budget_bytes=plan.memory_budget_bytes,
        kv_block_tokens=parts.pool.block_tokens,
        kv_blocks=parts.pool.capacity,
        kv_bytes=parts.pool.capacity * parts.storage.block_bytes,
        policy=how.policy,
        lookahead=parts.cache.lookahead.exactness,
        prefetch=config.prefetch,
        numerics=how.numerics,
        kernels=how.kernels,
        step_path=how.step_path,
        direct_io=parts.records.direct,
        fallbacks=how.fallbacks,
        torch_version=str(torch.__version__),
        transformers_version=transformers.__version__,
        device=how.device,
    )
