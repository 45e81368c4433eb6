"""Gives an engine its predictor and the policy that goes with it: what was asked for, or what the store recommends."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.config import Config
from expertd_engine.errors import ConfigError
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.policy import Policy, Victims, serving_policy
from expertd_engine.experts.scored import Scored, ScoredVictims
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.lab.predictor_file import has_predictor, read_predictor
from expertd_engine.lab.recommendation import read_recommendation
from expertd_engine.model.gates import NotLinear, find_gates
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.predictor import Learned, NextGate, PredictedRoutes, PredictorWatch, Source


@dataclass(frozen=True, slots=True)
class Choice:
    """Who gives way, and who foresees."""

    policy: str
    half_life_tokens: float | None
    """None: chosen while serving."""
    predictor: str
    """`none`, `next-gate` or `learned`."""
    fallback: str | None = None
    """Why the policy is not the one that the store recommends."""


def choose(config: Config, store: ExpertStore, *, may_predict: bool) -> Choice:
    """What holds: as asked for, else as the store's replays recommend, else what is known to do no harm.

    `may_predict`: whether the model's routers see hidden states, and nothing else foresees for them. Raises
    ConfigError for what cannot be, and StoreError for a recommendation that cannot be read.
    """
    auto = "auto" in (config.expert_policy, config.predictor)
    advice = read_recommendation(store.path, store.index.store_id) if auto else None
    policy, predictor, fallback = config.expert_policy, config.predictor, None
    if predictor == "auto":
        trained = policy == "predicted" or (advice is None and has_predictor(store.path))
        predictor = "none" if not may_predict else "learned" if trained else advice.predictor if advice else "none"
    if policy == "auto":
        policy = advice.policy if advice else "next-use"
        if policy == "predicted" and predictor != "learned":
            policy = "next-use"
            fallback = "the store recommends the policy predicted, and no learned predictor serves here: it is next-use"
    if predictor != "none" and not may_predict:
        raise ConfigError(f"predictor: {predictor} is not allowed for this model: its routes are known without it")
    if policy == "predicted" and predictor != "learned":
        raise ConfigError(
            f"expert_policy: predicted is not allowed with predictor {predictor}: it ranks by the learned"
        )
    return Choice(policy, advice.half_life_tokens if advice else None, predictor, fallback)


def predictor_source(choice: Choice, store: ExpertStore, loaded: LoadedModel) -> Source | None:
    """The numbers, in memory. Raises StoreError where nothing was trained, ConfigError for a model of no use."""
    if choice.predictor == "learned":
        return Learned(read_predictor(store.path, store.index.store_id))
    if choice.predictor == "none":
        return None
    try:
        return NextGate(find_gates(loaded.model, [layer.module for layer in store.index.layers]))
    except NotLinear as reason:
        raise ConfigError(f"predictor: next-gate is not allowed for this model: {reason}") from None


def policy_and_victims(choice: Choice, index: StoreIndex) -> tuple[Policy, Victims]:
    """As the ledger takes them."""
    if choice.policy == "predicted":
        scored = Scored(len(index.layers), max(layer.num_experts for layer in index.layers))
        return scored, ScoredVictims(scored)
    policy = served_policy(choice, index)
    return policy, Victims(policy)


def served_policy(choice: Choice, index: StoreIndex) -> Policy:
    """Any but `predicted`."""
    experts = [layer.num_experts for layer in index.layers]
    return serving_policy(choice.policy, experts, index.top_k, choice.half_life_tokens)


def predicted_routes(source: Source, index: StoreIndex, ledger: Ledger) -> tuple[PredictedRoutes, PredictorWatch]:
    """The lookahead, which wants to be governed, and who looks on for it."""
    experts = [layer.num_experts for layer in index.layers]
    victims = ledger.victims
    rescore = victims.rescore if isinstance(victims, ScoredVictims) else None
    watch = PredictorWatch(source, experts, index.top_k, ledger.resident_slots, rescore)
    return PredictedRoutes(watch, len(experts), max(experts)), watch


def is_trivial(index: StoreIndex) -> bool:
    """Whether every token uses every expert: nothing is left to predict."""
    return all(layer.num_experts == index.top_k for layer in index.layers)
