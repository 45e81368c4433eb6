"""Configuration is a value: one frozen dataclass, printed on demand. `config_sources` makes it.

Every option is declared here once; flags, environment names and documentation derive from it. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from expertd_engine.batching import Batching
from expertd_engine.errors import ConfigError

ENV_PREFIX = "EXPERTD_"
API_KEY_VARIABLE = ENV_PREFIX + "API_KEY"
"""Holds API keys, which are no part of the configuration: that is printed, logged and handed on."""

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """A byte budget as the user wrote it: an absolute number of bytes, or a share of all expert bytes."""

    bytes: int | None = None
    share: float | None = None

    def resolve(self, total_bytes: int) -> int:
        """The budget in bytes, where a share counts against `total_bytes`."""
        return self.bytes if self.bytes is not None else int((self.share or 0.0) * total_bytes)

    def __str__(self) -> str:
        """As it may be written: in the largest unit that says it exactly."""
        if self.bytes is None:
            return f"{(self.share or 0.0) * 100:g}%"
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            if self.bytes and self.bytes % _UNITS[unit.lower()] == 0:
                return f"{self.bytes // _UNITS[unit.lower()]}{unit}"
        return f"{self.bytes}"


def parse_size(text: str, *, share_allowed: bool = False) -> Size:
    """`4096`, `512MiB`, `2GB`, or (where a share is allowed) `25%`. Raises ConfigError naming the value."""
    allowed = "bytes, or a number with a unit such as 512MiB or 2GB"
    allowed += ", or a share such as 25%, of at most 100%" if share_allowed else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", text)
    if match:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and share_allowed and 0 < number <= 100:
            return Size(share=number / 100)
        if unit in _UNITS and number * _UNITS[unit] >= 1:
            return Size(bytes=int(number * _UNITS[unit]))
    raise ConfigError(f"{text!r} is not a size: allowed are {allowed}")


def _option(
    default: Any,
    help_text: str,
    *,
    group: str,
    share: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    metadata = {"help": help_text, "group": group, "share": share, "low": low, "high": high}
    return field(default=default, metadata=metadata)


Policy = Literal["auto", "lru", "lfu", "next-use", "predicted"]
Predictor = Literal["auto", "none", "next-gate", "learned"]
ToolParser = Literal["auto", "none", "hermes", "mistral", "json"]
Mode = Literal["exact", "virtual"]
Swaps = Literal["amortised", "foreseen"]
Dtype = Literal["auto", "float32", "bf16", "int8", "int4", "int4s"]
Verify = Literal["first", "always"]
Device = Literal["auto", "cpu", "cuda"]
DeviceMisses = Literal["auto", "link", "cpu", "both"]
Numerics = Literal["auto", "invariant"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Config:
    """Everything an operator can set. Units are in the help text and, for plain numbers, in the name."""

    model: str = _option("demo", "store, checkpoint folder, GGUF file, hub id, or `demo`", group="model")
    served_model_name: str | None = _option(None, "name clients use; default: the model's own", group="model")
    dtype: Dtype = _option("auto", "experts' format when a checkpoint is prepared on first use", group="model")
    dense_dtype: Dtype = _option("auto", "format of all other matrices then; auto: as the experts", group="model")
    cache_dir: Path = _option(Path("~/.cache/expertd"), "where prepared models are kept", group="model")

    expert_budget: Size | None = _option(
        None,
        "bytes for experts: slots, loads in flight and doomed loads, or a share of all expert bytes",
        group="budget",
        share=True,
    )
    memory_budget: Size | None = _option(
        None,
        "bytes a cgroup around server, engine and children is charged, less reclaimable page cache; where a GPU "
        "computes: bytes of its memory in use, PyTorch's own and graphs included",
        group="budget",
    )
    kv_budget: Size | None = _option(None, "bytes for keys and values; default: planned", group="budget")
    expert_policy: Policy = _option(
        "auto", "which resident expert gives way; auto: what `expertd replay` has recommended, else next-use",
        group="budget",
    )  # fmt: skip
    predictor: Predictor = _option(
        "auto", "who foresees routes; auto: who is recommended, else the learned one where the store has it",
        group="budget",
    )  # fmt: skip
    trace_dir: Path | None = _option(
        None, "record which experts tokens choose into this folder, for `expertd replay`", group="lab"
    )
    trace_share: float = _option(0.05, "of all steps, recorded in windows of 256", group="lab", low=0.0001, high=1)
    trace_limit: Size = _option(
        Size(bytes=64 * 2**20), "recorded parts kept in the folder, over restarts; the oldest go", group="lab"
    )
    expert_mode: Mode = _option(
        "exact", "exact: a token is computed by its own experts; virtual: by those that are there", group="budget"
    )
    max_substituted_mass: float = _option(
        1.0, "virtual: gate weight of a token that others may answer for in a layer, 0 to 1", group="budget",
        low=0, high=1,
    )  # fmt: skip
    virtual_share: float = _option(
        0.75, "of the expert budget, held for virtual mode while it is in use", group="budget", low=0.01, high=1
    )
    virtual_slots: int | None = _option(
        None, "experts a layer held for virtual mode; default: what its share has room for", group="budget", low=1
    )
    virtual_swaps: Swaps = _option(
        "amortised", "amortised: held experts change between steps, by what the next step's tokens are where `expertd "
        "profile` has learned that, which costs what a smaller model's do; foreseen: on the way to each layer, slowly",
        group="budget",
    )  # fmt: skip
    memory_pressure: bool = _option(
        False, "lend experts' memory to the box while it is short of it, as PSI and the cgroup's events say",
        group="budget",
    )  # fmt: skip
    prefetch: bool = _option(True, "load foreseen experts before they are needed", group="budget")
    warm_restart: bool = _option(
        True, "keep beside the store which experts were resident, and load them again after a restart", group="budget"
    )
    prefix_cache: bool = _option(True, "keep KV of past sequences for prompts that begin alike", group="budget")

    max_model_len: int | None = _option(None, "tokens of prompt and answer; default: the model's", group="batch", low=1)
    max_sequences: int = _option(32, "sequences computed at once", group="batch", low=1, high=4096)
    max_step_tokens: int = _option(512, "tokens in one step, prompt and answer alike", group="batch", low=1, high=65536)
    batching: Batching = _option(
        "decode-first",
        "who computes where a step's tokens do not suffice for all; expert-aware: those who share experts, which takes "
        "a pre-gated model",
        group="batch",
    )
    max_waiting: int = _option(256, "sequences that may wait; more are refused", group="batch", low=0)

    device: Device = _option(
        "auto", "what computes; auto: a CUDA device where there is one and the store is made for it", group="compute"
    )
    host_budget: Size | None = _option(
        None, "cuda: bytes of pinned memory for experts, or a share of all; default: all of them", group="budget",
        share=True,
    )  # fmt: skip
    device_misses: DeviceMisses = _option(
        "link", "cuda: what a step misses is read over the link, computed by the processor, which rounds otherwise, so "
        "that tokens depend on what is resident, or some by both at once; auto: as their measured speeds make quickest",
        group="compute",
    )  # fmt: skip
    numerics: Numerics = _option(
        "auto", "invariant: a token's bits never depend on its batch, or there is no start; auto: where that is free",
        group="compute",
    )  # fmt: skip
    threads: int | None = _option(None, "compute threads; default: cores this process may use", group="compute", low=1)
    io_threads: int = _option(2, "threads that read experts from disk", group="compute", low=1, high=64)

    verify_reads: Verify = _option(
        "first", "when an expert's checksum is compared: the first time it is read, or always", group="compute"
    )

    host: str = _option("127.0.0.1", "address to listen on", group="http")
    port: int = _option(8000, "TCP port; 0 lets the system choose", group="http", low=0, high=65535)
    tool_parser: ToolParser = _option("auto", "form of tool calls; auto: what the chat template teaches", group="http")
    max_body: Size = _option(Size(bytes=8 * 2**20), "largest request body", group="http")
    max_bodies: Size = _option(
        Size(bytes=32 * 2**20), "request bodies being read, checked and tokenized, together; at least max_body",
        group="http",
    )  # fmt: skip
    max_queued_tokens: int = _option(
        2**20, "prompt tokens of sequences that wait to be computed; more are refused", group="http", low=1
    )
    max_queue_wait_s: float = _option(
        300.0, "seconds a request may wait for its first step before it is refused", group="http", low=0.001
    )
    max_per_key: int | None = _option(None, "sequences one API key may have under way", group="http", low=1)
    api_key_file: Path | None = _option(
        None, f"API keys, one a line, # begins a comment; {API_KEY_VARIABLE} holds more", group="http"
    )
    admin_key_file: Path | None = _option(None, "keys for /admin routes, one a line", group="http")
    public_metrics: bool = _option(False, "answer /metrics without a key", group="http")
    ui: bool = _option(True, "serve the live page /ui", group="http")
    cors_origin: str | None = _option(
        None, "origins whose web pages may call, separated by commas, or *; default: none", group="http"
    )
    sse_keep_alive_s: float = _option(
        15.0, "seconds of silence after which a stream gets a comment; 0: never", group="http", low=0
    )
    drain_timeout_s: float = _option(30.0, "seconds running requests get to finish after SIGTERM", group="http", low=0)
    log_level: LogLevel = _option("info", "least severe level logged", group="http")


def config_to_json(config: Config) -> str:
    """One line that `config_from_json` reads back: how the server hands its configuration to the engine process."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def config_from_json(text: str) -> Config:
    """Inverse of `config_to_json`. Raises ConfigError."""
    try:
        return msgspec.json.decode(text, type=Config, dec_hook=lambda kind, value: kind(value))
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a configuration in JSON: {error}") from error


def card_options(config: Config) -> list[str]:
    """Options that are given and mean something on a card alone."""
    given = {"host_budget": config.host_budget is not None, "device_misses": config.device_misses != "link"}
    return [name for name, is_given in given.items() if is_given]


def option_names() -> list[str]:
    """All option names, in declaration order."""
    return [f.name for f in fields(Config)]
