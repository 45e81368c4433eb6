"""The wire contract between the server and the engine process. Plain data, no behaviour, no torch.

One ZeroMQ PAIR socket over `ipc://`; every frame is one msgpack-encoded message of the unions `ToEngine` or
`ToServer`. An unknown tag is an error, never ignored. Ids are chosen by the server and unique over its lifetime;
nothing assumes a single engine: a server with several engines keeps one socket and one snapshot for each.

Counters in a `Snapshot` are cumulative since the engine process started; the server keeps the offset of earlier
engine processes, so that what `/metrics` shows never falls.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 2

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: end-of-sequence or stop token; `length`: max_tokens or context; `abort`: asked for; `error`: see `error`."""

ExpertMode = Literal["exact", "virtual"]


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# ---------------------------------------------------------------- server → engine


class TextInput(_Message, frozen=True):
    """Token ids of a prompt, already inside the vocabulary and the context window. Other input kinds join the union."""

    token_ids: list[int]


ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


class Constraint(_Message, frozen=True):
    """What form an answer must have, already found sound by the server.

    `text` is the JSON schema, the regular expression (matching the whole answer), a JSON list of strings (choice) or
    the Lark grammar; empty for `json_object`.
    """

    kind: ConstraintKind
    text: str = ""


class Sampling(_Message, frozen=True):
    """How to choose tokens. Values were validated by the server; `None` means off.

    Noise is a counter-based function of (seed, choice index, position): the same seed gives the same text whatever
    else runs. A request without a seed gets a random one from the server.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    allowed_token_ids: list[int] | None = None
    """Nothing but these is generated."""
    bad_words: list[list[int]] = []
    """Token sequences that are never generated: the last token of each is barred where the others came before it."""
    logprobs: int | None = None
    """Number of top alternatives to report for each generated token; 0 reports the chosen token alone."""
    prompt_logprobs: int | None = None
    """The same for each prompt token (the first has none)."""
    constraint: Constraint | None = None


class Submit(_Message, frozen=True):
    """Start one sequence. A request of n choices or several prompts is several sequences, each with its own id."""

    sequence_id: int
    inputs: list[TextInput]
    sampling: Sampling
    choice_index: int = 0
    """Position among the choices of one prompt; part of the noise's counter."""
    priority: int = 0
    """Lower runs first; ties by arrival."""
    arrival_s: float = 0.0
    """Server's `time.monotonic()` at arrival (one box, one clock)."""
    mode: ExpertMode = "exact"
    max_substituted_mass: float = 1.0
    """In virtual mode: what share of a token's gate weight, 0 to 1, other experts may answer for in each layer. Past it
    the token waits for its own."""
    cache_salt: str = ""
    """Sequences share cached prefixes only with sequences of the same salt."""


class Abort(_Message, frozen=True):
    """End sequences now. The engine answers each live one with a `Finished(reason="abort")`; unknown ids are ignored,
    because a sequence may finish while the abort is under way."""

    sequence_ids: list[int]


class SetBudget(_Message, frozen=True):
    """Change budgets while serving; None leaves one as it is. Answered by `BudgetSet`.

    With a memory budget, the expert budget is a ceiling on what it leaves for experts.
    """

    expert_budget_bytes: int | None = None
    memory_budget_bytes: int | None = None


class Watch(_Message, frozen=True):
    """Somebody looks: send an `ExpertMap` every 250 ms for so many seconds."""

    seconds: float


class Shutdown(_Message, frozen=True):
    """Finish nothing more: abort what runs and exit 0. (The server drains before it sends this.)"""


ToEngine = Submit | Abort | SetBudget | Watch | Shutdown

# ---------------------------------------------------------------- engine → server


class Progress(_Message, frozen=True):
    """Start-up is under way: what is being done and how much of it, 0 to 1."""

    stage: str
    fraction: float


class EngineInfo(_Message, frozen=True):
    """What the engine serves, fixed for its lifetime. `numerics` is `invariant` or `per-batch` (law 7); `per-residency`
    where a token's bits also depend on which experts a card held, because the processor computed the others."""

    protocol: int
    pid: int
    model_type: str
    store_path: str
    store_id: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_sequences: int
    max_step_tokens: int
    eos_token_ids: list[int]
    num_moe_layers: int
    num_experts: int
    """Experts per MoE layer (the largest, where layers differ)."""
    top_k: int
    expert_record_bytes: int
    expert_bytes_total: int
    expert_budget_bytes: int
    minimum_expert_budget_bytes: int
    maximum_expert_budget_bytes: int
    """`SetBudget` may ask for so much: all experts, or what the memory budget leaves for them."""
    memory_budget_bytes: int | None
    kv_block_tokens: int
    kv_blocks: int
    kv_bytes: int
    policy: str
    lookahead: str
    """`exact`, `predicted` or `none`."""
    prefetch: bool
    numerics: str
    kernels: str
    """Instruction set of the native kernels, or `torch` where there are none."""
    step_path: str
    """`native`: whole steps run on them; `modules`: transformers' modules do all but the experts (on a card, all but
    these and attention). On a card `graph`: a step is one launch; `layers`: the host brings experts in at every
    layer."""
    direct_io: bool
    fallbacks: list[str]
    """Every path that runs slower or weaker than designed, in one sentence each."""
    torch_version: str
    transformers_version: str
    device: str = "cpu"
    """`cpu`, or the name of the card that computes."""


class Ready(_Message, frozen=True):
    """The engine takes requests from now on. Sent once."""

    info: EngineInfo


class TopLogprob(_Message, frozen=True):
    token_id: int
    logprob: float


class TokenLogprob(_Message, frozen=True):
    """The chosen (or prompt) token's log-probability and the alternatives asked for, best first."""

    token_id: int
    logprob: float
    top: list[TopLogprob]


class Output(_Message, frozen=True):
    """New tokens of one sequence, in order. `logprobs` runs parallel to `token_ids` when asked for."""

    sequence_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """All prompt tokens at once, first entry None; sent with or before the first token."""
    cached_tokens: int = 0
    """With the first token: prompt tokens whose KV was found in the prefix cache."""


class SequenceStats(_Message, frozen=True):
    """What one sequence met, for the usage block and the request log."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0
    expert_hits: int = 0
    expert_late: int = 0
    expert_misses: int = 0
    loaded_bytes: int = 0
    stall_s: float = 0.0
    """Sums over the steps this sequence took part in; steps are shared, so sums over sequences exceed the totals."""
    choices: int = 0
    """Its own (token, choice) pairs in virtual mode, over all layers, and how many of them were substituted."""
    substituted: int = 0
    substituted_mass: float = 0.0
    """Gate mass that other experts answered for, on average over the layers, summed over its `virtual_tokens`."""
    virtual_tokens: int = 0


class Finished(_Message, frozen=True):
    """The sequence has ended; nothing follows for it. Sent exactly once for each `Submit`."""

    sequence_id: int
    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    """For `error`: what happened. May name files: for the log."""
    refused: bool = False
    """`error` because what was asked for cannot be: then `error` is for the client."""
    constraint_met: bool = False
    """`stop` because nothing may follow: the last token is part of the text, as no end or stop token is."""
    stats: SequenceStats = SequenceStats()


class Steps(_Message, frozen=True):
    """All that one step brought, in one frame."""

    outputs: list[Output]
    finished: list[Finished]
    started: list[int] = []
    """Sequences that waited until now: this step was their first."""


class BudgetSet(_Message, frozen=True):
    """Answers `SetBudget`s in their order: the target now in force, or why it was refused (then nothing changed)."""

    expert_budget_bytes: int
    expert_limit_bytes: int
    """≥ the target only while leases hold what a lowered one takes back."""
    error: str | None = None
    memory_budget_bytes: int | None = None


class LayerLookups(_Message, frozen=True):
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


class VirtualLayer(_Message, frozen=True):
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


class LeadOutcomes(_Message, frozen=True):
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


class Foresight(_Message, frozen=True):
    """What was foreseen, and what could have been hit by a cache that foresees everything."""

    leads: list[LeadOutcomes] = []
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


class Tiers(_Message, frozen=True):
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
    """By what for: `landed` (kernels read and kept them), `read` (kernels read them), `prefetched` (copied before they
    were needed), `filled` (copied into empty slots), `held` (copied for virtual mode), `staged` (streamed through, for
    steps of many rows)."""
    link_bytes_per_s: float
    """As measured at start; infinite where host and device share their memory."""
    copies: int
    """That wait or are under way."""
    duplicates: int
    """Records that a step landed while they were being copied: their bytes crossed twice."""
    layer_waits: int
    """Times that the host was asked, in the middle of a step, to bring in what a layer lacks."""
    misses: str = "link"
    """What steps miss is read over the `link`, or computed by the `cpu`."""
    cpu_bytes_per_s: float = 0.0
    """Of records that the processor computes, as measured at start; 0 where it was not."""
    computed: int = 0
    """Missing experts that the processor computed, one for each step and layer: they cross no link."""
    computed_bytes: int = 0
    """Of their records."""


class HistogramData(_Message, frozen=True):
    """Cumulative since start. `counts[i]` counts values ≤ `bounds[i]` and > `bounds[i-1]`; the last is the overflow."""

    bounds: list[float]
    counts: list[int]
    total: float


class Snapshot(_Message, frozen=True):
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


class ExpertMap(_Message, frozen=True):
    """Where every expert is: one text for each MoE layer, one letter for each of its experts.

    `.` absent, `o` loading, `x` doomed, `r` resident, `L` leased.
    """

    layers: list[str]


class Fatal(_Message, frozen=True):
    """The engine cannot go on (or start). Last message before the process exits with `exit_code`."""

    exit_code: int
    error: str


ToServer = Progress | Ready | Steps | BudgetSet | Snapshot | ExpertMap | Fatal
