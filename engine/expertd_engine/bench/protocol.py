"""What a benchmark says to the processes that it measures, and what they answer. Plain data, one JSON line a message.

A process is told once what to be (its specification, as its one argument), then answers one `Answer` to each request it
reads from standard input. It ends with its input.
"""

from __future__ import annotations

from typing import Any

import msgspec


class EngineSpec(msgspec.Struct, frozen=True, tag="engine", forbid_unknown_fields=True):
    """An engine to measure. Sizes are as on the command line."""

    store: str
    expert_budget: str | None = None
    memory_budget: str | None = None
    policy: str = "auto"
    prefetch: bool = True
    routing: str = "model"
    hints: str = "none"
    """A channel over generated routes; `none` leaves what the engine foresees by itself."""
    streams: int = 1
    threads: int | None = None
    io_threads: int = 2
    max_step_tokens: int = 512
    max_model_len: int = 512
    seed: int = 0
    device: str = "cpu"
    device_misses: str = "link"
    disk_mib_s: float | None = None
    """Records come no faster than that; None: as fast as they do."""


class PeerSpec(msgspec.Struct, frozen=True, tag="peer", forbid_unknown_fields=True):
    """A llama.cpp model to measure."""

    gguf: str
    streams: int = 1
    threads: int | None = None
    max_tokens: int = 512
    """Of one stream: prompt and answer."""
    seed: int = 0


class DecodeRequest(msgspec.Struct, frozen=True, tag="decode", forbid_unknown_fields=True):
    """Start every stream on a prompt, take `warm` tokens each, then time `tokens` each."""

    tokens: int
    warm: int
    prompt: int


class TurnsRequest(msgspec.Struct, frozen=True, tag="turns", forbid_unknown_fields=True):
    """Start every stream on a prompt, take tokens with foresight until it is known whether it pays, `settle` at most;
    then `pairs` times, with and without it in turn, time `tokens` each. Answered by `Turns`.
    """

    pairs: int
    settle: int
    tokens: int
    """A multiple of four."""
    prompt: int


class PrefillRequest(msgspec.Struct, frozen=True, tag="prefill", forbid_unknown_fields=True):
    """Time a prompt of `tokens` from its submission to its first token; with `decode`, while a stream decodes: that one
    takes `warm` tokens before, and `after` tokens afterwards.
    """

    tokens: int
    decode: bool = False
    warm: int = 32
    after: int = 64


class DiskRequest(msgspec.Struct, frozen=True, tag="disk", forbid_unknown_fields=True):
    """Read records in random order, as the engine does, for about `seconds`."""

    seconds: float


class DescribeRequest(msgspec.Struct, frozen=True, tag="describe", forbid_unknown_fields=True):
    """What was started? Answered by `EngineFacts` or `PeerFacts`."""


Request = DecodeRequest | TurnsRequest | PrefillRequest | DiskRequest | DescribeRequest


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine under measurement. Sizes in bytes."""

    experts_total: int
    expert_budget: int
    record: int
    dense_read: int
    """Dense weights that every step reads: all but a table of embeddings that is nothing else."""
    experts_format: str
    dense_format: str
    layers: int
    experts: int
    top_k: int
    policy: str
    lookahead: str
    numerics: str
    fallbacks: list[str]
    device: str


class PeerFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: str
    threads: int
    system: str


class Decoded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One timed window. Everything but peaks and what became of prefetches is of the window alone."""

    elapsed_s: float
    tokens: int
    """Of all streams."""
    hits: int = 0
    late: int = 0
    misses: int = 0
    missed_bytes: int = 0
    """Read because a step demanded them and nothing had foreseen it."""
    transferred_bytes: int = 0
    stall_s: float = 0.0
    lru_transferred_bytes: int = 0
    """What an LRU cache of as many slots would have read on the same routes."""
    hardness: int = 0
    """Of the routes, to a cache of as many slots that goes by aged frequency and foresees nothing (`AgedReplay`). Told
    of sessions that take turns."""
    cpu_s: float = 0.0
    """Of `elapsed_s`, in which the engine's thread ran."""
    union: float = 0.0
    """Distinct experts a layer and step, mean."""
    peak_bytes: int = 0
    """Most expert bytes charged since start."""
    process_peak_bytes: int = 0
    prefetched_bytes: int = 0
    """Read because they were foreseen: of those that came to use or waste since the window before, or the start."""
    wasted_bytes: int = 0
    """Of these: in vain."""

    @property
    def tok_s(self) -> float:
        return self.tokens / self.elapsed_s

    @property
    def lookups(self) -> int:
        """Distinct (step, layer, expert)."""
        return self.hits + self.late + self.misses


class Turns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps without and with foresight, by pairs."""

    off: list[list[Decoded]]
    on: list[list[Decoded]]
    prefetched_bytes: int
    """From the first of the settling steps on."""
    wasted_bytes: int
    predicting: float
    """Share of the steps with foresight for which it had not been switched off as not paying."""


class Prefilled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ttft_s: float
    transferred_bytes: int = 0
    resident_bytes: int = 0
    """Before the prompt."""
    peak_bytes: int = 0
    process_peak_bytes: int = 0
    before_s: list[float] = []
    """Seconds between the other stream's tokens before the prompt,"""
    during_s: list[float] = []
    """while it was computed,"""
    after_s: list[float] = []
    """and afterwards."""


class DiskRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bytes_per_s: float
    direct: bool
    record_bytes: int
    threads: int


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`error` is set where the request failed; else `result`. The first answer comes unasked: it has started."""

    result: Any = None
    error: str | None = None
