"""What starting an engine takes, whatever computes its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from expertd_engine.cards import find_card, require_card
from expertd_engine.config import Config, card_options
from expertd_engine.core import Constrain, no_constraints
from expertd_engine.errors import ConfigError, ModelError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.governor import Governor
from expertd_engine.experts.ledger_base import LedgerBase
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.residency import State
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.grammar import Grammars
from expertd_engine.kernels.library import KernelsMissing, Pool
from expertd_engine.kernels.library import load as load_kernels
from expertd_engine.model.loader import LoadedModel
from expertd_engine.planning.startup_plan import Asked

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 16
VERIFY_AT_START_BYTES = 4 * 2**30
"""Stores up to this size are read and checked whole at start; larger ones record by record, on first load."""

Report = Callable[[str, float], None]
"""Told the stage of start-up and how much of it is done, 0 to 1."""


def device_of(config: Config, index: StoreIndex) -> torch.device | None:
    """The card that computes; None: the processor does. Raises ConfigError for one that is asked for and not there."""
    if config.device == "cuda":
        return require_card()
    made_for_one = {layout.order for layout in index.layouts} == {"rows"}
    card = find_card() if config.device == "auto" and made_for_one else None
    if card is None and (unused := card_options(config)):
        logger.warning("the processor computes, on which these options mean nothing: %s", ", ".join(unused))
    return card


def open_pool(threads: int, fallbacks: list[str]) -> Pool | None:
    """The native kernels' threads; None, and a fallback, where there are no native kernels."""
    try:
        return Pool(load_kernels(), threads)
    except KernelsMissing as reason:
        fallbacks.append(f"everything is computed by PyTorch, slowly: {reason}")
        return None


def verify_store(store: ExpertStore, report: Report) -> None:
    """Compare all checksums of a store that is small enough. Raises StoreError."""
    if store.index.expert_bytes_total() <= VERIFY_AT_START_BYTES:
        store.verify(lambda _, fraction: report("verify", fraction))
    else:
        logger.info("store %s is large: each record is checked when it is first read", store.path)


def make_constrain(store: ExpertStore, loaded: LoadedModel, fallbacks: list[str]) -> Constrain:
    """Who makes matchers of constraints; a fallback, and constraints are refused, where the tokenizer allows none."""
    try:
        return Grammars(store.path / "tokenizer.json", loaded.vocab_size, loaded.eos_token_ids).constrain
    except ModelError as error:
        fallbacks.append(str(error))
        return no_constraints


def model_len_of(config: Config, loaded: LoadedModel) -> int:
    """Tokens of prompt and answer. Raises ConfigError for more than the model was made for."""
    asked = config.max_model_len or loaded.context_tokens
    if asked > loaded.context_tokens:
        raise ConfigError(f"max_model_len: {asked} is not allowed: give at most the model's {loaded.context_tokens}")
    return asked


def asked_of(config: Config, max_model_len: int) -> Asked:
    """What the memory plan has to meet."""
    return Asked(config.expert_budget, config.memory_budget, config.kv_budget, max_model_len, config.max_sequences)


def governed(given: Lookahead, index: StoreIndex, ledger: LedgerBase) -> Governor:
    """What a predictor says, as far as it has been right."""
    num_layers, experts = len(index.layers), max(layer.num_experts for layer in index.layers)
    lookups, reads_ahead = num_layers * index.top_k, ledger.counters.reads_ahead
    return Governor(given, ledger.absent_for, num_layers, experts, lookups, _on_its_way(ledger), reads_ahead)


def policy_name(config: Config) -> str:
    """Where no replay has recommended another, `auto` is what is known of the future first, then frequency."""
    return "next-use" if config.expert_policy == "auto" else config.expert_policy


def _on_its_way(ledger: LedgerBase) -> Callable[[ExpertId], bool]:
    return lambda expert: ledger.state(expert) is State.LOADING
