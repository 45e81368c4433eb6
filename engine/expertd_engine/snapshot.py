"""All numbers of an engine at one instant, as it tells them to the server. Plain data, no behaviour, no torch.

Counters are cumulative since the engine process started; the server keeps the offset of earlier engine processes, so
that what `/metrics` shows never falls.
"""

from __future__ import annotations

import msgspec

from expertd_engine.wire import Message


class LayerLookups(Message, frozen=True):
    """Lookups of one MoE layer since start: one per distinct (step, layer, expert)."""

    hit: int
    late: int
    miss: int
    covered: int
    """Of these lookups: foreseen, a hint had named the use before it came."""
    hit_activations: int
    """(token, choice) pairs routed, by the result of the lookup that they share."""
    late_activations: int
    miss_activations: int


class VirtualLayer(Message, frozen=True):
    """Virtual mode in one MoE layer, since start but for `slots`."""

    choices: int
    """(token, choice) pairs of virtual steps."""
    substituted: int
    """Of these: answered by another expert than the router's own."""
    substituted_mass: float
    """Share of the gate weight that these were, summed over tokens."""
    swaps: int
    slots: int
    """Experts that virtual mode may hold now; 0 while nobody asks for it."""


class LeadOutcomes(Message, frozen=True):
    """What came of uses foreseen so many layers ahead while their experts were absent, over all layers, since start."""

    lead: int
    named: int
    """Whose layer has come since."""
    true: int
    """Of these: used."""
    followed: int
    """Let through by the governor; of these the next three."""
    followed_true: int
    late: int
    """True, and still on its way when it was needed."""
    in_vain: int
    """Not true, and read or being read."""
    layers_off: int
    """Layers that are not followed at this lead now."""


class Foresight(Message, frozen=True):
    """What was foreseen, and what could have been hit by a cache that foresees everything."""

    leads: list[LeadOutcomes] = msgspec.field(default_factory=list)
    """Ascending; empty where nothing is predicted."""
    sampled_lookups: int = 0
    """Of experts that the clairvoyant estimate follows, as the next two, since start."""
    sampled_hits: int = 0
    clairvoyant_hits: int = 0
    is_on: bool = True
    """Whether predictions are made now: not while steps are quicker without."""
    trials: int = 0
    """In which that was found out."""
    switches: int = 0
    """Times that a trial has changed it."""
    trace_rows: int = 0
    """Tokens whose routes were recorded."""
    trace_failure: str | None = None
    """Why routes are no longer recorded."""


class Shared(Message, frozen=True):
    """How link and processor share what a card's steps miss."""

    is_on: bool
    """Whether they do now: not while steps are quicker when the card reads alone."""
    cpu_bytes_per_s: float
    """Of records, what the processor is believed to compute while a step runs, if the link is as it was measured."""
    left: list[float]
    """Of 1, 2, … missing experts of the first layer, how many are left to the processor."""
    later: int
    """Layers in which the card had read its part before the processor had answered."""
    earlier: int
    """In which it had not."""
    trials: int
    """In which it was found out whether sharing pays."""
    switches: int
    """Times that a trial has changed it."""


class Tiers(Message, frozen=True):
    """Where a card's experts are, and what crossed its link since start."""

    device_bytes: int
    """Memory allotted for slots."""
    slots: int
    resident: int
    """Slots that hold an expert."""
    set_aside: int
    """Slots kept for what is read or copied next."""
    host_bytes: int
    """Of the tier below: all experts, or what its budget has room for."""
    host_pinned: bool
    """Whether the card reads them in place."""
    link_bytes: dict[str, int]
    """By what for: `landed` (kernels read and kept them), `read` (kernels read them), `shared` (kernels read them, of
    experts whose other part the processor computed), `prefetched` (copied before they were needed), `filled` (copied
    into empty slots), `held` (copied for virtual mode), `staged` (streamed through, for steps of many rows)."""
    link_bytes_per_s: float
    """As measured at start; infinite where host and device share their memory."""
    copies: int
    """That wait or are under way."""
    duplicates: int
    """Records that a step landed while they were being copied: their bytes crossed twice."""
    layer_waits: int
    """Times that the host was asked, in the middle of a step, to bring in what a layer lacks."""
    misses: str = "link"
    """What steps miss is read over the `link`, computed by the `cpu`, or some by `both` at once."""
    cpu_bytes_per_s: float = 0.0
    """Of records that the processor computes, as measured at start; 0 where it was not."""
    computed: int = 0
    """Missing experts that the processor computed, or a part of, one for each step and layer: what it computed crosses
    no link."""
    computed_bytes: int = 0
    """Of their records, or of the part that it computed."""
    shared: Shared | None = None
    """None where they do not share what is missing."""
    steps_ahead: int = 0
    """Steps that were launched behind another, before the host had seen its tokens."""
    steps_in_vain: int = 0
    """Of these, those whose sequences had all ended by then."""


class HistogramData(Message, frozen=True):
    """Cumulative since start. `counts[i]` counts values ≤ `bounds[i]` and > `bounds[i-1]`; the last is the overflow."""

    bounds: list[float]
    counts: list[int]
    total: float


class Snapshot(Message, frozen=True):
    """All numbers of one instant, sent every 250 ms while there is work, else every second: also the heartbeat."""

    time_s: float
    """Engine's `time.monotonic()`."""
    lookups: list[LayerLookups]
    demand_loads: int
    demand_bytes: int
    prefetch_loads: int
    prefetch_bytes: int
    read_bytes: int
    """What transfer threads have read: the sum of demand and prefetch bytes."""
    prefetch_issued: int
    """The sum of the next five."""
    prefetch_used: int
    prefetch_late: int
    prefetch_wasted: int
    prefetch_cancelled: int
    prefetch_pending: int
    prefetch_outcome_bytes: dict[str, int]
    """Lengths of the records whose prefetch ended so: `used`, `late`, `wasted`, `cancelled`."""
    load_queue: int
    """Loads that wait for a transfer thread or are in one."""
    load_seconds: float
    """Busy time of the transfer threads, summed over threads."""
    load_failures: int
    records_swept: int
    """Records that the background sweep has read and compared with their checksums."""
    records_bad: list[str]
    """What is wrong with those that it last found bad, the first eight."""
    cpu_seconds: float
    """Processor time of the engine process, all threads."""
    stall_seconds: dict[str, float]
    """By cause: `disk_read` (a demanded record is being read), `expert_wait` (it waits for room), `link_estimated` (a
    GPU's kernels read it over the link: bytes ÷ bandwidth, since nobody can look at the clock there)."""
    step_stall_seconds: dict[str, HistogramData]
    """By cause: how long steps that stood still did so."""
    evictions: dict[str, int]
    """By reason: `capacity`, `budget_change`."""
    expert_budget_bytes: int
    expert_limit_bytes: int
    """≥ budget only while a lowered budget waits for leases to end."""
    resident_bytes: int
    loading_bytes: int
    """Loads in flight, doomed ones included."""
    peak_expert_bytes: int
    residents_by_layer: list[int]
    memory_used_bytes: int
    memory_peak_bytes: int
    memory_source: str
    """Where the two figures above come from: `cgroup` or `process`."""
    memory_budget_bytes: int | None
    memory_shrinks: int
    """Times that memory was found above its budget and the expert budget was lowered by the excess."""
    pressure_stalled: float
    """Share of the last second in which a task stood still for memory, 0 to 1; 0 unless `memory_pressure` is on."""
    pressure_lent_bytes: int
    """Of the expert budget, lent to a box short of memory."""
    pressure_shrinks: int
    """Times that bytes were lent."""
    dense_bytes: int
    kv_capacity_bytes: int
    kv_used_bytes: int
    """Of sequences; blocks that several share count once."""
    kv_cached_bytes: int
    """Kept for prefixes to come: unused, and given up whenever a sequence needs the room."""
    prefix_cache_queries: int
    """Tokens of admitted sequences that were looked up, and `hits`, how many of them needed no computing."""
    prefix_cache_hits: int
    kv_cache_evictions: int
    """Cached blocks given up for room."""
    running: int
    waiting: int
    preemptions: int
    steps: dict[str, int]
    """By phase: `prefill` (any prompt token in the step) or `decode`."""
    virtual: list[VirtualLayer]
    """By MoE layer; empty where the model has no virtual mode."""
    virtual_tokens: int
    """Tokens of virtual steps."""
    step_seconds: dict[str, HistogramData]
    """By phase, as the next."""
    step_tokens: dict[str, HistogramData]
    load_latency_seconds: HistogramData
    foresight: Foresight = Foresight()
    tiers: Tiers | None = None
    """None where the processor computes."""
