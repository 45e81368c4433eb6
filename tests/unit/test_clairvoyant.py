from __future__ import annotations

import numpy as np
import pytest

from expertd_engine.bench.routing import RoutingShape, make_routing
from expertd_engine.experts.clairvoyant import HORIZON_STEPS, ClairvoyantEstimate
from expertd_engine.lab.events import events_of
from expertd_engine.lab.rankings import ClairvoyantRanking
from expertd_engine.lab.replay import replay
from expertd_engine.lab.trace import Ids, Trace, TraceHeader

SHAPE = RoutingShape(8, 32, 4)
TOKENS = 600


@pytest.fixture(scope="module")
def routes() -> Ids:
    routing = make_routing("calibrated:fine", SHAPE, seed=1)
    assert routing is not None
    return routing.stream(0).take(TOKENS)


def estimate(routes: Ids, slots: int, most: int) -> ClairvoyantEstimate:
    found = ClairvoyantEstimate([SHAPE.experts] * SHAPE.layers, lambda: slots, most)
    for token in routes.tolist():
        found.begin_step()
        for layer, experts in enumerate(token):
            found.use(layer, experts, [-1] * SHAPE.experts)
    return found


def truth(routes: Ids, slots: int) -> float:
    rows, ones = len(routes), np.ones(len(routes), bool)
    header = TraceHeader("", [SHAPE.experts] * SHAPE.layers, SHAPE.top_k, [1] * SHAPE.layers)
    events = events_of(Trace(header, routes, np.arange(rows), np.zeros(rows, np.int64), ones, np.arange(rows)))
    return replay(events, slots, ClairvoyantRanking(events)).hit_rate


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5])
def test_with_every_expert_followed_it_is_beladys_bound(routes: Ids, share: float) -> None:
    """But for what a step computes with, which takes no room here: seen were 1.3, 0.3 and 0.0 points above it."""
    slots = int(share * SHAPE.layers * SHAPE.experts)
    met = estimate(routes, slots, SHAPE.layers * SHAPE.experts).met
    assert met.lookups == TOKENS * SHAPE.layers * SHAPE.top_k
    assert -0.002 < met.clairvoyant_hits / met.lookups - truth(routes, slots) < 0.03


def test_a_sample_says_nearly_the_same(routes: Ids) -> None:
    """Seen: 0.9 points below it."""
    slots = SHAPE.layers * SHAPE.experts // 4
    met, bound = estimate(routes, slots, 64).met, truth(routes, slots)
    assert met.lookups < 0.4 * TOKENS * SHAPE.layers * SHAPE.top_k
    assert abs(met.clairvoyant_hits / met.lookups - bound) < 0.03


def test_what_is_resident_counts_as_hit_and_what_is_long_ago_as_lost() -> None:
    found = ClairvoyantEstimate([2], lambda: 2)
    for slots in ([-1, 0], [0, 0]):
        found.begin_step()
        found.use(0, [0], slots)
    assert (found.met.lookups, found.met.hits, found.met.clairvoyant_hits) == (2, 1, 1)
    for _ in range(HORIZON_STEPS):
        found.begin_step()
    found.use(0, [0], [0, 0])
    assert (found.met.lookups, found.met.clairvoyant_hits) == (3, 1)


def test_intervals_compete_for_the_room_there_is() -> None:
    """One slot, two experts by turns: nobody can keep both; the one kept hits every time."""
    found = ClairvoyantEstimate([2], lambda: 1)
    for step in range(20):
        found.begin_step()
        found.use(0, [step % 2], [-1, -1])
    assert 8 <= found.met.clairvoyant_hits <= 10
