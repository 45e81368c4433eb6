"""Generated routes and foresight: what they must be, how well they fit, and that nothing leaks from what is to come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expertd_engine.bench.channel import DEFAULT_RECALLS, Channel, make_channel
from expertd_engine.bench.fit_routing import TARGETS, hit_rates
from expertd_engine.bench.generated import ChannelLookahead, GeneratedRoutes
from expertd_engine.bench.replay import AgedReplay, LRUReplay, lru_lookups
from expertd_engine.bench.routing import Ids, Routing, RoutingShape, calibrated, make_routing
from expertd_engine.errors import UsageError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import Load, Loaded
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.slab import PAGE, Slab
from expertd_engine.experts.transfer import Completions, Transfers

SHAPE = RoutingShape(layers=6, experts=16, top_k=3)
NAMES = ["uniform", "calibrated:qwen3-30b", "calibrated:fine"]


def routing(name: str, shape: RoutingShape = SHAPE, seed: int = 0) -> Routing:
    made = make_routing(name, shape, seed)
    assert made is not None
    return made


@pytest.mark.parametrize("name", NAMES)
def test_routes_are_distinct_ascending_and_seeded(name: str) -> None:
    routes = routing(name).stream(0).take(200)
    assert routes.shape == (200, 6, 3)
    assert (np.diff(routes, axis=-1) > 0).all()
    assert routes.min() == 0
    assert routes.max() == 15
    assert (routes == routing(name).stream(0).take(200)).all()
    assert (routes != routing(name).stream(1).take(200)).any()
    assert (routes != routing(name, seed=1).stream(0).take(200)).any()


def test_uniform_routes_use_all_experts_alike_and_forget() -> None:
    routes = routing("uniform").stream(0).take(4000)
    counts = np.bincount(routes.ravel(), minlength=16)
    assert abs(counts / counts.mean() - 1).max() < 0.05
    assert kept(routes, 1) == pytest.approx(3 / 16, abs=0.01)


def test_calibrated_routes_persist_and_drift() -> None:
    routes = routing("calibrated:fine").stream(0).take(2000)
    assert kept(routes, 1) > kept(routes, 50) + 0.05 > kept(routes, 1000) + 0.1


def kept(routes: Ids, lag: int) -> float:
    """Share of a token's experts that the token `lag` later uses too."""
    sooner, later = routes[:-lag, :, :, None], routes[lag:, :, None, :]
    return float((sooner == later).any(axis=-1).mean())


@pytest.mark.parametrize("profile", list(TARGETS))
def test_the_committed_numbers_hit_as_published(profile: str) -> None:
    """On a stream that the fit has not seen; the published row has a kink that no smooth curve follows closer."""
    target = TARGETS[profile]
    found = hit_rates(target.shape, calibrated(profile), list(target.hits), tokens=800, warm=300, seed=1)
    for rate, (low, high) in zip(found, target.hits.values(), strict=True):
        assert low - 0.03 <= rate <= high + 0.03


def test_lru_replay_is_event_atomic() -> None:
    """Two slots with experts 0 and 1: an event for {2, 0} hits 0 although 2 comes first and 0 is the oldest."""
    cache = LRUReplay(2)
    assert cache.event(0, [0, 1]).misses == 2
    met = cache.event(0, [2, 0])
    assert (met.hits, met.misses) == (1, 1)
    assert cache.event(0, [1]).misses == 1


def test_lru_replay_shares_its_slots_between_layers() -> None:
    steps = [(True, [[0], [0]])] * 3
    assert lru_lookups(steps, 1).hits == 0
    assert (lru_lookups(steps, 2).hits, lru_lookups(steps, 2).misses) == (4, 2)
    assert lru_lookups([(False, [[0], [0]]), *steps], 2).hit_ratio == 1.0
    with pytest.raises(ValueError, match="0 slots"):
        LRUReplay(0)


def test_what_is_used_again_and_again_outlasts_what_is_not_where_uses_are_counted() -> None:
    """Expert 0 of layer 1 every time, expert 1 half of the times, others once."""
    steps = [[[], [0]], [[], [0, 1]]] * 20
    aged, lru = AgedReplay(RoutingShape(2, 8, 2), 3), LRUReplay(3)
    assert (aged.feed(steps), lru.feed(steps).misses) == (4, 2), "each in a layer that misses nothing else"
    passing = [[[2, 3], [0]], [[4, 5], [0]], [[], [1]]]
    assert (aged.feed(passing), lru.feed(passing).misses) == (5 + 3, 6), "expert 0 stays where uses are counted"


@pytest.mark.parametrize("name", ["calibrated:nobody", "trace:", "zipf", "trace:/nowhere.npz"])
def test_unknown_routings_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=name.partition(":")[2] or name):
        make_routing(name, SHAPE)
    assert make_routing("model", SHAPE) is None


def test_a_trace_is_replayed_and_begins_anew(tmp_path: Path) -> None:
    routes = routing("uniform").stream(0).take(10)
    np.savez(tmp_path / "trace.npz", routes=routes[..., ::-1])
    stream = routing(f"trace:{tmp_path / 'trace.npz'}").stream(0)
    assert (stream.take(7) == routes[:7]).all()
    assert (stream.take(6) == np.concatenate([routes[7:], routes[:3]])).all()


@pytest.mark.parametrize(
    ("routes", "fault"),
    [(np.zeros((4, 6, 2), int), "shape"), (np.full((4, 6, 3), 16), "distinct"), (np.zeros((4, 6, 3), int), "distinct")],
)
def test_a_trace_that_does_not_fit_is_refused(routes: Ids, fault: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", routes=routes)
    with pytest.raises(UsageError, match=fault):
        make_routing(f"trace:{tmp_path / 'trace.npz'}", SHAPE)


# ---------------------------------------------------------------- the channel


def test_the_channel_recalls_as_stated() -> None:
    routes = routing("uniform", RoutingShape(8, 64, 8)).stream(0).take(500)
    predicted = Channel(DEFAULT_RECALLS).predict(routes, 64, np.random.default_rng(0))
    right = (predicted[..., None] == routes[:, :, None, None, :]).any(axis=-1)
    for lead, recall in enumerate(DEFAULT_RECALLS):
        assert right[:, :, lead].mean() == pytest.approx(recall, abs=0.01)
    assert (np.diff(np.sort(predicted, axis=-1), axis=-1) > 0).all()
    nearer, farther = right[:, :, 0], right[:, :, 3]
    assert (nearer | ~farther).all(), "what is known far ahead is known near by"


def test_channels_by_name() -> None:
    assert make_channel("none") is None
    assert make_channel("default") == Channel(DEFAULT_RECALLS)
    assert make_channel("exact") == Channel((1.0,), at_once=True)
    assert make_channel("exact:16") == Channel((1.0,) * 16)
    assert make_channel("0.9,0.5") == Channel((0.9, 0.5))
    for name in ("perfect", "exact:0", "1.5", "0.5,0.9", ""):
        with pytest.raises(UsageError, match="not allowed"):
            make_channel(name)


def test_hints_name_the_next_layers_and_wrap_into_the_next_token() -> None:
    channel = Channel((1.0, 1.0))
    source = GeneratedRoutes(routing("uniform"), channel, streams=2)
    lookahead = ChannelLookahead(source, channel)
    source.begin_step([(0, 1), (1, 1)])
    now = [sorted(set(source.route(layer, 2).ravel().tolist())) for layer in range(6)]
    first = list(lookahead.routed(5, 0, now[0]))
    last = [hint for layer in range(1, 6) for hint in lookahead.routed(5, layer, now[layer])]
    source.begin_step([(0, 1), (1, 1)])
    then = [sorted(set(source.route(layer, 2).ravel().tolist())) for layer in range(6)]

    period = 6 * 16
    assert [(hint.expert.layer, hint.expert.expert) for hint in first] == [(1, e) for e in now[1]] + [
        (2, e) for e in now[2]
    ]
    assert [hint.needed_at for hint in first] == [5 * period + 16 * layer + e for layer in (1, 2) for e in now[layer]]
    wrapped = [hint for hint in last if hint.needed_at >= 6 * period]
    assert [(hint.expert.layer, hint.expert.expert) for hint in wrapped] == [(0, e) for e in then[0]] + [
        (1, e) for e in then[1]
    ]
    assert lookahead.next_use(wrapped[0].expert, 5 * period) == wrapped[0].needed_at
    assert lookahead.next_use(wrapped[0].expert, wrapped[0].needed_at) is None


def test_what_is_known_at_once_is_the_whole_step_and_nothing_beyond() -> None:
    channel = make_channel("exact")
    assert channel is not None
    source = GeneratedRoutes(routing("uniform"), channel, streams=2)
    lookahead = ChannelLookahead(source, channel, slots_of=lambda layer: [-1] * 15 + [7])
    source.begin_step([(0, 1), (1, 1)])
    experts, period = source.announced.experts(), 6 * 16
    assert experts == [sorted(set(source.route(layer, 2).ravel().tolist())) for layer in range(6)]
    hints = list(lookahead.begin_step(3, [1, 2]))
    named = [(layer, e) for layer, chosen in enumerate(experts) for e in chosen if e != 15]
    assert [tuple(hint.expert) for hint in hints] == named, "of all layers, those that are absent"
    assert [hint.needed_at for hint in hints] == [3 * period + 16 * layer + e for layer, e in named]
    assert lookahead.next_use(hints[-1].expert, 3 * period) == hints[-1].needed_at
    assert [list(lookahead.routed(3, layer, chosen)) for layer, chosen in enumerate(experts)] == [[]] * 6
    assert not list(lookahead.begin_step(4, [1] * 33)), "a prompt reads nearly all anyway"


def test_rows_are_the_next_tokens_of_their_streams() -> None:
    source = GeneratedRoutes(routing("uniform"), streams=2)
    one, other = (routing("uniform").stream(number, 2).take(400) for number in (0, 1))
    source.begin_step([(1, 2), (0, 1)])
    assert (source.route(3, 3) == np.concatenate([other[:2], one[:1]])[:, 3]).all()
    source.begin_step([(0, 300)])
    assert (source.route(5, 300) == one[1:301, 5]).all()
    with pytest.raises(ValueError, match="3 rows; 300 were announced"):
        source.route(0, 3)


# ---------------------------------------------------------------- nothing leaks


class InstantTransfers(Transfers):
    """Loads end the moment they are asked for, so that what happens depends on decisions alone. Keeps them."""

    def __init__(self) -> None:
        self.completions = Completions()
        self.did: list[object] = []

    def submit(self, load: Load, buffer: memoryview) -> None:
        self.did.append(("load", load.expert, load.slot, load.priority))
        self.completions.put(Loaded(load.load_id), len(buffer))

    def promote(self, load_id: int) -> None:
        self.did.append(("promote", load_id))

    def cancel(self, load_id: int) -> None:
        self.did.append(("cancel", load_id))


def everything_done(trace: Ids, channel: Channel) -> list[list[object]]:
    """Run the engine's cache and ledger over a trace; all they did up to the end of each layer of each step."""
    source = GeneratedRoutes(replace(routing("uniform"), trace=trace), channel)
    records = [PAGE] * SHAPE.layers
    ledger = Ledger(records, [SHAPE.experts] * SHAPE.layers, 30 * PAGE, make_policy("next-use"), prefetch_depth=8)
    transfers = InstantTransfers()
    slab = Slab(ledger.num_slots, PAGE)
    cache = ExpertCache(ledger, slab, transfers, ChannelLookahead(source, channel), records)
    done = []
    for _ in range(len(trace) - 1):
        source.begin_step([(0, 1)])
        cache.begin_step([1])
        for layer in range(SHAPE.layers):
            experts = source.route(layer, 1)[0].tolist()
            left = len(experts)
            with cache.lease(layer, experts) as leases:
                while left:
                    taken = leases.take()
                    transfers.did.append(("took", layer, taken))
                    leases.release([index for index, _ in taken])
                    left -= len(taken)
            cache.pump()
            done.append(list(transfers.did))
        cache.end_step()
    return done


@pytest.mark.parametrize("channel", [Channel((1.0, 1.0, 1.0, 1.0)), Channel(DEFAULT_RECALLS)], ids=["exact", "default"])
@pytest.mark.parametrize("cut", [9, 20, 32])
def test_what_lies_beyond_the_channel_changes_nothing(channel: Channel, cut: int) -> None:
    """Permute the experts of all layers that come more than four layers after the `cut`-th."""
    trace = routing("calibrated:fine").stream(0).take(12)
    changed = trace.copy().reshape(-1, SHAPE.top_k)
    swap = (np.arange(SHAPE.experts) + 5) % SHAPE.experts
    changed[cut + 5 :] = np.sort(swap[changed[cut + 5 :]], axis=-1)
    one, other = (everything_done(routes.reshape(trace.shape), channel) for routes in (trace, changed))
    assert one[: cut + 1] == other[: cut + 1]
    assert one[cut + 1] != other[cut + 1], "the channel reaches four layers ahead: the next one shows the change"


def test_a_permuted_future_is_seen_once_it_comes() -> None:
    trace = routing("uniform").stream(0).take(6)
    changed = trace.copy()
    changed[3:] = np.sort((changed[3:] + 5) % SHAPE.experts, axis=-1)
    assert everything_done(trace, Channel((0.0,)))[-1] != everything_done(changed, Channel((0.0,)))[-1]
