"""The experts of an engine on the processor: slots, who decides over them, who reads into them, whose foresight."""

from __future__ import annotations

from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import EveryExpert, LayerScan, Lookahead, NoLookahead
from expertd_engine.experts.pregated import PregatedLookahead
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.experts.transfer import Transfers
from expertd_engine.model.expert_torch import SlotViews
from expertd_engine.model.loader import attach_experts
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.predictor_build import policy_and_victims, predicted_routes
from expertd_engine.model.runner import Onlooker
from expertd_engine.planning.startup_plan import StartupPlan
from expertd_engine.startup_context import Context
from expertd_engine.startup_parts import governed

_PREFETCHES = 4
"""For each reading thread: those that have not begun are overtaken by demands, and threads find work until the next
layer has routed."""


def expert_cache(
    context: Context, plan: StartupPlan, records: RecordFile
) -> tuple[ExpertCache, list[MoELayer], list[Onlooker]]:
    """Slots for the plan's budget, none of them filled; the MoE layers, which compute from them; who looks on."""
    config, index = context.config, context.store.index
    record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
    policy, victims = policy_and_victims(context.choice, index)
    ledger = Ledger(
        record_bytes,
        [layer.num_experts for layer in index.layers],
        plan.expert_budget_bytes,
        policy,
        max_budget_bytes=index.expert_bytes_total(),
        prefetch=config.prefetch,
        prefetch_depth=_PREFETCHES * config.io_threads,
        victims=victims,
    )
    given, watch = context.lookahead, None
    if context.source is not None:
        given, watch = predicted_routes(context.source, index, ledger)
    lookahead: Lookahead
    if context.pregate is not None and context.lookahead is None and context.routes is None:
        lookahead = PregatedLookahead(len(index.layers), max(ledger.experts_per_layer), ledger.resident_slots)
    else:
        lookahead = lookahead_for(index, 2 * config.io_threads, given, ledger)
    slab = Slab(ledger.num_slots, max(record_bytes), whole_bytes=min(record_bytes))
    views = SlotViews(slab.whole, slab.stride, index.layouts)
    transfers = Transfers(records, config.io_threads)
    if transfers.one_by_one is not None:
        context.fallbacks.append(f"experts are read one by one: {transfers.one_by_one}")
    cache = ExpertCache(ledger, slab, transfers, lookahead, record_bytes)
    if watch is not None:
        watch.payoff = cache.payoff
    return cache, attach_experts(context.loaded, context.store, views), [] if watch is None else [watch]


def lookahead_for(index: StoreIndex, window: int, given: Lookahead | None, ledger: Ledger) -> Lookahead:
    """Exact where every token chooses every expert; else what is given or nothing, but for steps of many rows.

    What a given one predicts is governed.
    """
    num_layers, counts = len(index.layers), {layer.num_experts for layer in index.layers}
    if counts == {index.top_k}:
        return EveryExpert(num_layers, index.top_k, window)
    if given is not None and given.exactness == "predicted":
        given = governed(given, index, ledger)
    return LayerScan(given or NoLookahead(), num_layers, max(counts), index.top_k)
