"""The lab's replay against the ledger that serves, and against what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from expertd_engine.bench.routing import RoutingShape, make_routing
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.half_life import HalfLives
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import HALF_LIFE_TOKENS, AdaptiveNextUse, make_policy
from expertd_engine.experts.scored import Scored, ScoredVictims
from expertd_engine.lab.compare import compare, recommend
from expertd_engine.lab.events import NEVER, Events, events_of
from expertd_engine.lab.rankings import (
    AdaptiveRanking,
    ClairvoyantRanking,
    ForeseenRanking,
    LeastStaleRanking,
    LFURanking,
    LRURanking,
    NamedRanking,
    Ranking,
    ScoredRanking,
)
from expertd_engine.lab.replay import replay
from expertd_engine.lab.scores import named_by
from expertd_engine.lab.trace import Ids, Trace, TraceHeader
from expertd_engine.model.gates import Gate
from expertd_engine.planning.replay import LedgerReplay, Met

SHAPE = RoutingShape(6, 16, 4)
TOKENS = 400


def trace_of(routes: Ids, decode: np.ndarray | None = None, steps: Ids | None = None) -> Trace:
    rows, layers, top_k = routes.shape
    header = TraceHeader("store", [SHAPE.experts] * layers, top_k, [1] * layers)
    zeros, ones = np.zeros(rows, np.int64), np.ones(rows, bool)
    return Trace(
        header, routes, np.arange(rows) if steps is None else steps, zeros, ones if decode is None else decode, zeros
    )


def popular_routes(tokens: int) -> Ids:
    """Some experts are always used more than others."""
    luck = np.random.default_rng(0).random((tokens, SHAPE.layers, SHAPE.experts))
    popular = np.argsort(-luck * np.arange(SHAPE.experts, 0, -1))[..., : SHAPE.top_k]
    return np.sort(popular, axis=-1)


@pytest.fixture(scope="module")
def routes() -> Ids:
    routing = make_routing("calibrated:fine", SHAPE, seed=3)
    assert routing is not None
    return routing.stream(0).take(TOKENS)


@pytest.mark.parametrize("slots", [24, 48])
@pytest.mark.parametrize("name", ["lru", "lfu", "next-use"])
def test_hits_are_those_of_the_ledger(routes: Ids, name: str, slots: int) -> None:
    """To a tenth of a point: within one event the ledger may break a tie otherwise."""
    ledger, met = LedgerReplay([1] * SHAPE.layers, [SHAPE.experts] * SHAPE.layers, slots, make_policy(name, 24)), Met()
    met.by_layer = [0] * SHAPE.layers
    for token in routes.tolist():
        ledger.token(token, met)
    events = events_of(trace_of(routes))
    ranking: Ranking = LRURanking(events) if name == "lru" else LFURanking(events, HALF_LIFE_TOKENS)
    found = replay(events, slots, ranking)
    assert found.lookups == met.lookups == TOKENS * SHAPE.layers * SHAPE.top_k
    assert abs(found.hit_rate - met.hit_rate) < 0.001


def test_hits_are_those_of_the_ledger_where_it_adapts() -> None:
    routes = popular_routes(TOKENS)
    counts, slots = [SHAPE.experts] * SHAPE.layers, 24
    policy = AdaptiveNextUse(HalfLives(counts, 24))
    ledger, met = LedgerReplay([1] * SHAPE.layers, counts, slots, policy), Met(by_layer=[0] * SHAPE.layers)
    for token in routes.tolist():
        ledger.token(token, met)
    events = events_of(trace_of(routes))
    found = replay(events, slots, AdaptiveRanking(events, slots))
    assert abs(found.hit_rate - met.hit_rate) < 0.001
    fixed = replay(events, slots, LFURanking(events))
    assert policy.half_life > round(HALF_LIFE_TOKENS * 24) and found.misses < fixed.misses


def best_possible(events: Events, slots: int) -> int:
    """Fewest misses, by Belady's rule in plain Python: the yardstick of the yardstick."""
    uses: dict[int, list[int]] = {}
    spans = [(number, events.experts[begin:end].tolist()) for number, (begin, end) in enumerate(events)]
    for number, experts in spans:
        for expert in experts:
            uses.setdefault(expert, []).append(number)
    resident: set[int] = set()
    misses = 0
    for number, experts in spans:
        missing = [expert for expert in experts if expert not in resident]
        misses += len(missing)
        idle = sorted(resident - set(experts), key=lambda e: min((u for u in uses[e] if u > number), default=10**9))
        room = slots - len(resident)
        resident -= set(idle[len(idle) - max(0, len(missing) - room) :])
        resident |= set(missing)
    return misses


def test_nothing_beats_the_clairvoyant_and_it_is_beladys(routes: Ids) -> None:
    events = events_of(trace_of(routes[:120]))
    bound = replay(events, 24, ClairvoyantRanking(events))
    assert bound.misses == best_possible(events, 24)
    made: list[Callable[[], Ranking]] = [
        lambda: LRURanking(events), lambda: LFURanking(events), lambda: LeastStaleRanking(events),
        lambda: ForeseenRanking(events, 4),
    ]  # fmt: skip
    for make in made:
        assert replay(events, 24, make()).misses >= bound.misses


def test_all_that_is_known_makes_foresight_clairvoyant(routes: Ids) -> None:
    events = events_of(trace_of(routes[:120]))
    seeing = replay(events, 24, ForeseenRanking(events, len(events.bounds)))
    # Nothing is known before the first event has been met: the first uses alone may differ.
    assert seeing.misses <= replay(events, 24, ClairvoyantRanking(events)).misses * 1.02
    assert replay(events, 24, ForeseenRanking(events, 0)).misses == replay(events, 24, LFURanking(events)).misses


def named_exactly(routes: Ids, leads: int) -> NDArray[np.int16]:
    """What a predictor would name that is never wrong, but at the trace's end."""
    following = np.concatenate([routes, np.roll(routes, -1, axis=0)], axis=1)
    return np.stack([following[:, lead : lead + SHAPE.layers] for lead in range(1, leads + 1)], axis=2).astype(np.int16)


def test_a_predictor_that_is_right_is_as_good_as_knowing_and_one_that_is_wrong_is_not(routes: Ids) -> None:
    events = events_of(trace_of(routes))
    known = replay(events, 24, ForeseenRanking(events, 4)).misses
    named = named_exactly(routes, 4)
    assert abs(replay(events, 24, NamedRanking(events, named)).misses - known) <= 2
    assert replay(events, 24, NamedRanking(events, np.flip(named, 0))).misses > known


def test_gates_name_what_they_choose() -> None:
    rng = np.random.default_rng(0)
    size = SHAPE.experts
    gates = [
        Gate(np.roll(np.eye(size, dtype=np.float32), layer, 0), *np.zeros((3, size), np.float32)) for layer in (0, 3)
    ]
    gates = [replace(gate, scale=np.ones(size, np.float32)) for gate in gates]
    states = rng.random((5, 2, size)).astype(np.float16)
    trace = replace(trace_of(np.zeros((5, 2, SHAPE.top_k), np.int64)), hidden=states)
    named = named_by(trace, gates, leads=1)
    for row in range(5):
        best = set(np.argsort(-states[row, 0])[: SHAPE.top_k].tolist())
        assert set(named[row, 0, 0].tolist()) == {(expert + 3) % size for expert in best}


def test_rows_of_a_step_share_lookups_and_prompts_scan(routes: Ids) -> None:
    decode = np.array([False, True, False, False])
    events = events_of(trace_of(routes[:4], decode, np.array([0, 0, 0, 1])))
    for number, (begin, end) in enumerate(events):
        step, layer = divmod(number, SHAPE.layers)
        rows = routes[:3, layer] if step == 0 else routes[3:4, layer]
        assert (events.experts[begin:end] - layer * SHAPE.experts).tolist() == sorted(set(rows.ravel().tolist()))
        decoded = set(routes[1, layer].tolist()) if step == 0 else set()
        scanned = [expert % SHAPE.experts not in decoded for expert in events.experts[begin:end].tolist()]
        assert events.scan[begin:end].tolist() == scanned


def test_a_prompt_does_not_flush_what_decoding_works_with() -> None:
    """Law 5: one expert a layer decodes, then a prompt uses all others once; decoding still hits."""
    top_k = 1
    decoding = np.zeros((30, 2, top_k), np.int64)
    prompt = np.arange(1, 13)[:, None, None] * np.ones((1, 2, top_k), np.int64)
    routes = np.concatenate([decoding, prompt, decoding])
    decode = np.r_[np.ones(30, bool), np.zeros(12, bool), np.ones(30, bool)]
    steps = np.r_[np.arange(30), np.full(12, 30), np.arange(31, 61)]
    events = events_of(trace_of(routes, decode, steps))
    met = replay(events, 10, LRURanking(events), warm=62)
    assert met.hit_rate == 1.0 and met.lookups == 60


def test_next_uses_name_the_event_that_comes_next(routes: Ids) -> None:
    events = events_of(trace_of(routes[:50]))
    following = events.next_uses()
    spans = [set(events.experts[begin:end].tolist()) for begin, end in events]
    for number, (begin, end) in list(enumerate(events))[::17]:
        for lookup in range(begin, end):
            later = [n for n in range(number + 1, len(spans)) if events.experts[lookup] in spans[n]]
            assert following[lookup] == (later[0] if later else NEVER)


class Rescoring(NoLookahead):
    """Foresees nothing, and tells the victims the scores of each event as it is met."""

    def __init__(self, victims: ScoredVictims, scores: np.ndarray) -> None:
        self._victims, self._scores = victims, scores
        self._layer, self._number = -1, 0

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        if expert.layer != self._layer:
            self._layer = expert.layer
            self._victims.rescore(expert.layer, self._scores[self._number])
            self._number += 1
        return None


def test_scores_rank_as_the_serving_victims_do(routes: Ids) -> None:
    """The policy that predicts: the lab's ranking and the ledger's victims choose alike."""
    events = events_of(trace_of(routes[:150]))
    scores = np.random.default_rng(1).standard_normal((len(events.bounds) - 1, SHAPE.experts)).astype(np.float32)
    policy = Scored(SHAPE.layers, SHAPE.experts)
    victims = ScoredVictims(policy)
    sizes = [1] * SHAPE.layers
    ledger = LedgerReplay(sizes, [SHAPE.experts] * SHAPE.layers, 40, policy, Rescoring(victims, scores), victims)
    met = Met(by_layer=[0] * SHAPE.layers)
    for token in routes[:150].tolist():
        ledger.token(token, met)
    assert replay(events, 40, ScoredRanking(events, scores)).misses == met.misses


def test_what_hits_most_is_recommended_and_the_simpler_where_they_are_alike() -> None:
    routes = popular_routes(TOKENS)
    found = compare(trace_of(routes), [24, 48], warm=0.1)
    assert found.closed(24, "lru") == 0 and found.closed(24, "clairvoyant") == 1
    met = found.met[24]
    assert met["slow frequency"].misses < met["frequency"].misses, "where some are always used more, memory helps"
    assert found.best() == "adaptive frequency", "and it is found out"
    advice = recommend(found, "store")
    assert (advice.policy, advice.half_life_tokens, advice.predictor) == ("next-use", None, "none")
    assert advice.hit_rates["24"]["lru"] == found.met[24]["lru"].hit_rate
    everything = compare(trace_of(routes), [SHAPE.layers * SHAPE.experts])
    assert everything.best() == "lru" and everything.closed(SHAPE.layers * SHAPE.experts, "lru") is None
