"""Which of the engine's numbers are metrics, and under what name, labels and words. Pure tables over a `Snapshot`.

`tier` is where bytes lie: `host` (memory, where experts are computed from) and `disk` (the store); with a card, `host`
means what it computes from, its own memory, but in `expertd_tier_bytes`, which tells the two apart. Labels are closed
sets, and each of their values is there from the first scrape of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from expertd_engine.snapshot import HistogramData, LayerLookups, LeadOutcomes, Shared, Snapshot, Tiers, VirtualLayer

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]
HistogramSamples = Iterable[tuple[Labels, HistogramData]]

HOST, DISK = "host", "disk"
UP = (DISK, HOST)
"""The way of a load: from tier, to tier."""

FROM_TO = ("from_tier", "to_tier")
PHASES = ("prefill", "decode")
STALL_CAUSES = ("disk_read", "expert_wait")
PREFETCH_OUTCOMES = ("used", "late", "wasted", "cancelled")
LINK_CAUSES = ("landed", "read", "shared", "prefetched", "filled", "held", "staged")
MISSES = ("link", "cpu", "both")
NO_TIERS = Tiers(0, 0, 0, 0, 0, False, dict.fromkeys(LINK_CAUSES, 0), 0.0, 0, 0, 0, misses="")
"""Where there is no card."""


@dataclass(frozen=True, slots=True)
class Family:
    """One counter or gauge read off a snapshot; counters are cumulative since the engine process started."""

    name: str
    help: str
    labels: Labels
    read: Callable[[Snapshot], Samples]


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """One histogram read off a snapshot, cumulative like counters."""

    name: str
    help: str
    labels: Labels
    read: Callable[[Snapshot], HistogramSamples]


def _by_layer(read: Callable[[LayerLookups], dict[Labels, int]]) -> Callable[[Snapshot], Samples]:
    def samples(s: Snapshot) -> Iterator[tuple[Labels, float]]:
        for i, layer in enumerate(s.lookups):
            for labels, count in read(layer).items():
                yield (str(i), *labels), count

    return samples


def _by_virtual_layer(read: Callable[[VirtualLayer], dict[Labels, float]]) -> Callable[[Snapshot], Samples]:
    """Zeros where the model has no virtual mode."""

    def samples(s: Snapshot) -> Iterator[tuple[Labels, float]]:
        for i, layer in enumerate(s.virtual or [VirtualLayer(0, 0, 0.0, 0, 0)] * len(s.lookups)):
            for labels, count in read(layer).items():
                yield (str(i), *labels), count

    return samples


def _one(read: Callable[[Snapshot], float]) -> Callable[[Snapshot], Samples]:
    return lambda s: [((), read(s))]


def _of_tiers(read: Callable[[Tiers], dict[Labels, float]]) -> Callable[[Snapshot], Samples]:
    """Zeros where there is no card."""
    return lambda s: read(s.tiers or NO_TIERS).items()


def _of_shared(read: Callable[[Shared], float]) -> Callable[[Snapshot], Samples]:
    """0 where link and processor do not share."""
    return lambda s: [((), 0.0 if s.tiers is None or s.tiers.shared is None else read(s.tiers.shared))]


def _by_key(read: Callable[[Snapshot], dict[str, int] | dict[str, float]]) -> Callable[[Snapshot], Samples]:
    return lambda s: [((key,), value) for key, value in read(s).items()]


LEADS = range(1, 9)
"""Layers ahead that have series of their own; what is foreseen further ahead is counted with the last."""


def _by_lead(read: Callable[[LeadOutcomes], dict[Labels, float]]) -> Callable[[Snapshot], Samples]:
    """Zeros for leads at which nothing was foreseen."""

    def samples(s: Snapshot) -> Iterator[tuple[Labels, float]]:
        found = {(str(lead), *labels): 0.0 for lead in LEADS for labels in read(LeadOutcomes(lead, *[0] * 7))}
        for one in s.foresight.leads:
            for labels, count in read(one).items():
                found[(str(min(one.lead, LEADS[-1])), *labels)] += count
        return iter(found.items())

    return samples


def _outcomes(s: Snapshot) -> dict[str, int]:
    return dict(
        zip(
            PREFETCH_OUTCOMES,
            (s.prefetch_used, s.prefetch_late, s.prefetch_wasted, s.prefetch_cancelled),
            strict=True,
        )
    )


COUNTERS = (
    Family("expert_lookups", "Lookups, one per distinct (step, layer, expert), by the tier where the expert was found.",
           ("layer", "tier", "result"),
           _by_layer(lambda x: {(HOST, "hit"): x.hit, (DISK, "late"): x.late, (DISK, "miss"): x.miss})),
    Family("expert_activations", "Pairs of (token, choice) routed, by where their expert was when it was asked for.",
           ("layer", "residency"),
           _by_layer(lambda x: {("resident",): x.hit_activations, ("loading",): x.late_activations,
                                ("absent",): x.miss_activations})),
    Family("expert_substitutions", "Pairs of (token, choice) that another expert answered. Exact mode has none.",
           ("layer", "mode"), _by_virtual_layer(lambda x: {("virtual",): x.substituted})),
    Family("expert_virtual_choices", "Pairs of (token, choice) in virtual mode.", ("layer",),
           _by_virtual_layer(lambda x: {(): x.choices})),
    Family("expert_substituted_mass", "Gate weight of substituted choices, 0 to 1 for each token, summed over tokens.",
           ("layer",), _by_virtual_layer(lambda x: {(): x.substituted_mass})),
    Family("expert_swaps", "Experts that took another's place among those held for virtual mode.", ("layer",),
           _by_virtual_layer(lambda x: {(): x.swaps})),
    Family("virtual_tokens", "Tokens computed in virtual mode.", (), _one(lambda s: s.virtual_tokens)),
    Family("expert_lookahead_experts", "Lookups by whether lookahead had named the use before it came.",
           ("layer", "outcome"),
           _by_layer(lambda x: {("covered",): x.covered, ("uncovered",): x.hit + x.late + x.miss - x.covered})),
    Family("expert_hints", "Uses of absent experts that were predicted so many layers ahead, by what came of them.",
           ("lead", "outcome"), _by_lead(lambda x: {("true",): x.true, ("false",): x.named - x.true})),
    Family("expert_hints_followed", "Of expert_hints, those that the governor let through: in_time or late for a use "
           "that came, in_vain read for one that did not, idle where nothing was read for one that did not.",
           ("lead", "outcome"),
           _by_lead(lambda x: {("in_time",): x.followed_true - x.late, ("late",): x.late, ("in_vain",): x.in_vain,
                               ("idle",): x.followed - x.followed_true - x.in_vain})),
    Family("foresight_trials", "Times that decode steps were timed with and without predictions.", (),
           _one(lambda s: s.foresight.trials)),
    Family("trace_rows", "Tokens whose routes were recorded, with --trace-dir.", (),
           _one(lambda s: s.foresight.trace_rows)),
    Family("expert_sampled_lookups", "Lookups of the experts that the clairvoyant estimate follows.", (),
           _one(lambda s: s.foresight.sampled_lookups)),
    Family("expert_sampled_hits", "Of expert_sampled_lookups, those that hit.", (),
           _one(lambda s: s.foresight.sampled_hits)),
    Family("expert_clairvoyant_hits", "Of expert_sampled_lookups, those that would hit in a cache that knew the "
           "future.", (), _one(lambda s: s.foresight.clairvoyant_hits)),
    Family("expert_prefetch_issued", "Prefetches issued: the sum of all outcomes and of those pending.", (),
           _one(lambda s: s.prefetch_issued)),
    Family("expert_prefetch", "Prefetches by what became of them.", ("tier_from", "tier_to", "outcome"),
           lambda s: [((*UP, outcome), count) for outcome, count in _outcomes(s).items()]),
    Family("expert_prefetch_bytes", "Record bytes of prefetches by what became of them.",
           ("tier_from", "tier_to", "outcome"),
           lambda s: [((*UP, outcome), count) for outcome, count in s.prefetch_outcome_bytes.items()]),
    Family("expert_evictions", "Experts that gave way, by reason.", ("tier", "reason"),
           lambda s: [((HOST, reason), count) for reason, count in s.evictions.items()]),
    Family("expert_load_failures", "Loads that ended without their bytes.", (), _one(lambda s: s.load_failures)),
    Family("store_records_swept", "Records that the background sweep has compared with their checksums.", (),
           _one(lambda s: s.records_swept)),
    Family("swap_transfers", "Records moved, by kind.", (*FROM_TO, "kind"),
           lambda s: [((*UP, "demand"), s.demand_loads), ((*UP, "prefetch"), s.prefetch_loads)]),
    Family("swap_bytes", "Bytes moved, by kind.", (*FROM_TO, "kind"),
           lambda s: [((*UP, "demand"), s.demand_bytes), ((*UP, "prefetch"), s.prefetch_bytes)]),
    Family("swap_seconds", "Busy time of the transfer threads, summed over threads.", FROM_TO,
           lambda s: [(UP, s.load_seconds)]),
    Family("store_read_bytes", "Bytes that transfer threads read from the store: the sum of swap_bytes.", (),
           _one(lambda s: s.read_bytes)),
    Family("stall_seconds", "Time in which compute stood still because data was missing: disk_read, an expert is being "
           "read; expert_wait, it waits for a slot; link_estimated, a GPU read it over its link; host_compute, the "
           "processor computed it for a GPU.",
           ("cause",), _by_key(lambda s: s.stall_seconds)),
    Family("link_bytes", "Bytes that crossed a card's link: landed, kernels read and kept them; read, kernels read "
           "them; shared, likewise, of experts whose other part the processor computed; prefetched, filled and held "
           "(by virtual mode), copied; staged, streamed through for steps of many rows. 0 without a card.",
           ("cause",), _of_tiers(lambda x: {(cause,): x.link_bytes[cause] for cause in LINK_CAUSES})),
    Family("link_duplicates", "Records that a step landed while they were being copied to the card.", (),
           _of_tiers(lambda x: {(): x.duplicates})),
    Family("layer_waits", "Times that the host was asked, in the middle of a card's step, to bring in what a layer "
           "lacks.", (), _of_tiers(lambda x: {(): x.layer_waits})),
    Family("host_computed_experts", "Missing experts that the processor computed for a card, or a part of, by step and "
           "layer: that crosses no link.", (), _of_tiers(lambda x: {(): x.computed})),
    Family("host_computed_bytes", "Bytes of the records of host_computed_experts, or of the part that it computed.", (),
           _of_tiers(lambda x: {(): x.computed_bytes})),
    Family("engine_steps_ahead", "Steps that were launched on a card behind another, before the host had seen its "
           "tokens.", (), _of_tiers(lambda x: {(): x.steps_ahead})),
    Family("engine_steps_in_vain", "Of engine_steps_ahead, those whose sequences had all ended by then.", (),
           _of_tiers(lambda x: {(): x.steps_in_vain})),
    Family("engine_steps", "Forward passes; prefill: with any prompt token in it.", ("phase",),
           _by_key(lambda s: s.steps)),
    Family("engine_cpu_seconds", "Processor time of the engine process, all threads.", (),
           _one(lambda s: s.cpu_seconds)),
    Family("preemptions", "Sequences that gave KV blocks back and start over.", (), _one(lambda s: s.preemptions)),
    Family("memory_shrinks", "Times memory was above its budget and the expert budget was lowered by the excess.", (),
           _one(lambda s: s.memory_shrinks)),
    Family("memory_pressure_shrinks", "Times that experts lent memory to a box that was short of it.", (),
           _one(lambda s: s.pressure_shrinks)),
    Family("prefix_cache_queries", "Tokens of admitted sequences that were looked up among cached KV blocks.", (),
           _one(lambda s: s.prefix_cache_queries)),
    Family("prefix_cache_hits", "Tokens found in cached KV blocks and so not computed.", (),
           _one(lambda s: s.prefix_cache_hits)),
    Family("kv_cache_evictions", "Cached KV blocks given up for room.", (), _one(lambda s: s.kv_cache_evictions)),
)  # fmt: skip

GAUGES = (
    Family("foresight_on", "1 while predictions are made; 0 while decode steps were found quicker without.", (),
           _one(lambda s: s.foresight.is_on)),
    Family("expert_hint_layers_off", "Layers for which the governor has switched this lead off: it did not pay.",
           ("lead",), _by_lead(lambda x: {(): x.layers_off})),
    Family("expert_prefetch_pending", "Prefetches issued whose outcome is not known yet.", (),
           _one(lambda s: s.prefetch_pending)),
    Family("memory_budget_bytes", "The budget of a pool.", ("pool", "tier"),
           lambda s: [(("experts", HOST), s.expert_budget_bytes), (("kv", HOST), s.kv_capacity_bytes)]),
    Family("memory_limit_bytes", "The limit in force: above the budget only while a lowered one waits for leases.",
           ("pool", "tier"), lambda s: [(("experts", HOST), s.expert_limit_bytes)]),
    Family("memory_resident_bytes", "Bytes that hold finished data.", ("pool", "tier"),
           lambda s: [(("experts", HOST), s.resident_bytes), (("dense", HOST), s.dense_bytes),
                      (("kv", HOST), s.kv_used_bytes + s.kv_cached_bytes)]),
    Family("memory_reserved_bytes", "Bytes taken by what is not there yet: loads in flight, doomed ones included.",
           ("pool", "tier"), lambda s: [(("experts", HOST), s.loading_bytes)]),
    Family("memory_peak_bytes", "Largest sum of resident and reserved bytes since the engine started.",
           ("pool", "tier"), lambda s: [(("experts", HOST), s.peak_expert_bytes)]),
    Family("store_records_bad", "Records that the background sweep last found different from their checksums, of the "
           "first eight.", (), _one(lambda s: len(s.records_bad))),
    Family("memory_lent_bytes", "Bytes of the expert budget lent to a box that is short of memory.", (),
           _one(lambda s: s.pressure_lent_bytes)),
    Family("memory_pressure_ratio", "Share of the last second in which a task stood still for memory, 0 to 1; 0 unless "
           "--memory-pressure is on.", (), _one(lambda s: s.pressure_stalled)),
    Family("memory_used_bytes", "Memory in use as the kernel counts it.", ("source",),
           lambda s: [((s.memory_source,), s.memory_used_bytes)]),
    Family("memory_used_peak_bytes", "Largest memory in use as the kernel counts it.", ("source",),
           lambda s: [((s.memory_source,), s.memory_peak_bytes)]),
    Family("experts_resident", "Experts in slots.", ("layer", "tier"),
           lambda s: [((str(i), HOST), count) for i, count in enumerate(s.residents_by_layer)]),
    Family("expert_virtual_slots", "Experts that may be held for virtual mode; 0 while nobody asks for it.", ("layer",),
           _by_virtual_layer(lambda x: {(): x.slots})),
    Family("swap_queue_depth", "Loads that wait for a transfer thread or are in one.", ("from_tier",),
           lambda s: [((DISK,), s.load_queue)]),
    Family("kv_cache_used_bytes", "Bytes of KV blocks that sequences hold.", ("tier",),
           lambda s: [((HOST,), s.kv_used_bytes)]),
    Family("kv_cache_cached_bytes", "Bytes of KV blocks that no sequence holds, kept for prompts that begin alike.",
           ("tier",), lambda s: [((HOST,), s.kv_cached_bytes)]),
    Family("kv_cache_capacity_bytes", "Bytes of all KV blocks.", ("tier",), lambda s: [((HOST,), s.kv_capacity_bytes)]),
    Family("kv_cache_usage_ratio", "Share of KV blocks that sequences hold, 0 to 1.", ("tier",),
           lambda s: [((HOST,), s.kv_used_bytes / s.kv_capacity_bytes if s.kv_capacity_bytes else 0.0)]),
    Family("tier_bytes", "Memory for experts with a card: its slots (device), and the tier below (host).", ("tier",),
           _of_tiers(lambda x: {("device",): x.device_bytes, (HOST,): x.host_bytes})),
    Family("device_slots", "A card's slots: with an expert, set aside for what comes next, or empty.", ("use",),
           _of_tiers(lambda x: {("resident",): x.resident, ("set_aside",): x.set_aside,
                                ("empty",): max(0, x.slots - x.resident - x.set_aside)})),
    Family("link_copies", "Copies to a card that wait or are under way.", (), _of_tiers(lambda x: {(): x.copies})),
    Family("link_bytes_per_second", "What a card's link carried when it was measured, at start.", (),
           _of_tiers(lambda x: {(): x.link_bytes_per_s})),
    Family("host_bytes_per_second", "Of experts' records, as the processor computed them when it was measured beside a "
           "card's link, at start; 0 where it was not.", (), _of_tiers(lambda x: {(): x.cpu_bytes_per_s})),
    Family("host_serving_bytes_per_second", "Of experts' records, what the processor is believed to compute beside a "
           "card's link while steps run; it moves with who is later.", (), _of_shared(lambda x: x.cpu_bytes_per_s)),
    Family("device_misses_shared", "1 while link and processor share what a card's steps miss; 0 otherwise, as while "
           "steps are quicker when the card reads alone.", (), _of_shared(lambda x: float(x.is_on))),
    Family("device_misses", "1 for who computes what a card's steps miss: the card, over its link, the processor, or "
           "both.", ("by",), _of_tiers(lambda x: {(by,): float(x.misses == by) for by in MISSES})),
    Family("requests_running", "Sequences being computed.", (), _one(lambda s: s.running)),
    Family("requests_waiting", "Sequences waiting in the engine.", (), _one(lambda s: s.waiting)),
)  # fmt: skip

HISTOGRAMS = (
    HistogramFamily("engine_step_seconds", "Time that the engine took for a step; of one that was launched on a "
                    "card behind another, from when it was turned to.", ("phase",),
                    lambda s: [((phase,), data) for phase, data in s.step_seconds.items()]),
    HistogramFamily("engine_step_tokens", "Tokens in a step.", ("phase",),
                    lambda s: [((phase,), data) for phase, data in s.step_tokens.items()]),
    HistogramFamily("swap_transfer_seconds", "Duration of one load, from when it began.", FROM_TO,
                    lambda s: [(UP, s.load_latency_seconds)]),
    HistogramFamily("step_stall_seconds", "How long steps stood still that did, by cause as stall_seconds.",
                    ("cause",), lambda s: [((cause,), data) for cause, data in s.step_stall_seconds.items()]),
)  # fmt: skip
