"""The wire contract between the server and the engine process. Plain data, no behaviour, no torch.

One ZeroMQ PAIR socket over `ipc://`; every frame is one msgpack-encoded message of the unions `ToEngine` or
`ToServer`. An unknown tag is an error, never ignored. Ids are chosen by the server and unique over its lifetime;
nothing assumes a single engine: a server with several engines keeps one socket and one snapshot for each.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from expertd_engine.snapshot import Snapshot
from expertd_engine.wire import Message

PROTOCOL_VERSION = 2

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: end-of-sequence or stop token; `length`: max_tokens or context; `abort`: asked for; `error`: see `error`."""

ExpertMode = Literal["exact", "virtual"]


# ---------------------------------------------------------------- server → engine


class TextInput(Message, frozen=True):
    """Token ids of a prompt, already inside the vocabulary and the context window. Other input kinds join the union."""

    token_ids: list[int]


ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


class Constraint(Message, frozen=True):
    """What form an answer must have, already found sound by the server.

    `text` is the JSON schema, the regular expression (matching the whole answer), a JSON list of strings (choice) or
    the Lark grammar; empty for `json_object`.
    """

    kind: ConstraintKind
    text: str = ""


class Sampling(Message, frozen=True):
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
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int = 0
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    ignore_eos: bool = False
    allowed_token_ids: list[int] | None = None
    """Nothing but these is generated."""
    bad_words: list[list[int]] = msgspec.field(default_factory=list)
    """Token sequences that are never generated: the last token of each is barred where the others came before it."""
    logprobs: int | None = None
    """Number of top alternatives to report for each generated token; 0 reports the chosen token alone."""
    prompt_logprobs: int | None = None
    """The same for each prompt token (the first has none)."""
    constraint: Constraint | None = None


class Submit(Message, frozen=True):
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


class Abort(Message, frozen=True):
    """End sequences now. The engine answers each live one with a `Finished(reason="abort")`; unknown ids are ignored,
    because a sequence may finish while the abort is under way."""

    sequence_ids: list[int]


class SetBudget(Message, frozen=True):
    """Change budgets while serving; None leaves one as it is. Answered by `BudgetSet`.

    With a memory budget, the expert budget is a ceiling on what it leaves for experts.
    """

    expert_budget_bytes: int | None = None
    memory_budget_bytes: int | None = None


class Watch(Message, frozen=True):
    """Somebody looks: send an `ExpertMap` every 250 ms for so many seconds."""

    seconds: float


class Shutdown(Message, frozen=True):
    """Finish nothing more: abort what runs and exit 0. (The server drains before it sends this.)"""


ToEngine = Submit | Abort | SetBudget | Watch | Shutdown

# ---------------------------------------------------------------- engine → server


class Progress(Message, frozen=True):
    """Start-up is under way: what is being done and how much of it, 0 to 1."""

    stage: str
    fraction: float


class EngineInfo(Message, frozen=True):
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


class Ready(Message, frozen=True):
    """The engine takes requests from now on. Sent once."""

    info: EngineInfo


class TopLogprob(Message, frozen=True):
    token_id: int
    logprob: float


class TokenLogprob(Message, frozen=True):
    """The chosen (or prompt) token's log-probability and the alternatives asked for, best first."""

    token_id: int
    logprob: float
    top: list[TopLogprob]


class Output(Message, frozen=True):
    """New tokens of one sequence, in order. `logprobs` runs parallel to `token_ids` when asked for."""

    sequence_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """All prompt tokens at once, first entry None; sent with or before the first token."""
    cached_tokens: int = 0
    """With the first token: prompt tokens whose KV was found in the prefix cache."""


class SequenceStats(Message, frozen=True):
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


class Finished(Message, frozen=True):
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


class Steps(Message, frozen=True):
    """All that one step brought, in one frame."""

    outputs: list[Output]
    finished: list[Finished]
    started: list[int] = msgspec.field(default_factory=list)
    """Sequences that waited until now: this step was their first."""


class BudgetSet(Message, frozen=True):
    """Answers `SetBudget`s in their order: the target now in force, or why it was refused (then nothing changed)."""

    expert_budget_bytes: int
    expert_limit_bytes: int
    """≥ the target only while leases hold what a lowered one takes back."""
    error: str | None = None
    memory_budget_bytes: int | None = None


class ExpertMap(Message, frozen=True):
    """Where every expert is: one text for each MoE layer, one letter for each of its experts.

    `.` absent, `o` loading, `x` doomed, `r` resident, `L` leased.
    """

    layers: list[str]


class Fatal(Message, frozen=True):
    """The engine cannot go on (or start). Last message before the process exits with `exit_code`."""

    exit_code: int
    error: str


ToServer = Progress | Ready | Steps | BudgetSet | Snapshot | ExpertMap | Fatal
