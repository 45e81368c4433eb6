"""Hints on a device: what is resident is not worth the host's time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_hints import AbsentHints, Tried, payoff_of
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness, NoLookahead
from support.calls import calls_of
from support.device_caches import EXPERTS, LAYERS, make_cache
from support.fake_device import FakeDevice, FakeStep

SLOTS = [[-1, 3, -1], [0, -1, 7]]


class Foresight:
    exactness: Exactness = "exact"

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return [Hint(ExpertId(0, expert), expert) for expert in range(3)]

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return [Hint(ExpertId(1, expert), 3 + expert) for expert in range(3)]

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return 42


def test_only_absent_experts_are_named() -> None:
    hints = AbsentHints(Foresight(), SLOTS.__getitem__)
    assert [hint.expert for hint in hints.begin_step(1, ())] == [ExpertId(0, 0), ExpertId(0, 2)]
    assert [hint.expert for hint in hints.routed(1, 0, (0,))] == [ExpertId(1, 1)]
    assert (hints.exactness, hints.next_use(ExpertId(1, 0), 0)) == ("exact", 42)


def test_what_comes_or_goes_is_seen_at_the_next_layer() -> None:
    slots = [list(layer) for layer in SLOTS]
    hints = AbsentHints(Foresight(), slots.__getitem__)
    slots[1] = [-1, 5, -1]
    assert [hint.expert for hint in hints.routed(1, 0, (0,))] == [ExpertId(1, 0), ExpertId(1, 2)]


def test_what_is_exact_is_tried_as_well() -> None:
    hints = Tried(Foresight())
    assert payoff_of(hints) is hints.payoff and payoff_of(NoLookahead()) is None
    assert len(list(hints.begin_step(1, ()))) == 3 and len(list(hints.routed(1, 0, (0,)))) == 3
    assert (hints.exactness, hints.next_use(ExpertId(1, 0), 0)) == ("exact", 42)


class Names(NoLookahead):
    """After each layer it names an absent expert of the next."""

    exactness: Exactness = "exact"

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> list[Hint]:
        return [Hint(ExpertId(1, 5), (step * LAYERS + 1) * EXPERTS + 5)]


def test_a_host_hears_of_routes_only_while_hints_pay() -> None:
    cache = make_cache(4, HostDevice())
    cache.lookahead = tried = Tried(Names())
    asked: list[int] = []

    def heard(layer: int) -> list[int]:
        asked.append(layer)
        return [0]

    cache.routes = lambda: heard

    def step() -> None:
        cache.begin_step([0])
        cache.before_launch()
        cache.table.apply()
        cache.after_launch()
        cache.table.progress[0] = int(cache.table.launch) + 1
        cache.poll()
        cache.end_step()

    for on in (False, True):
        tried.payoff.is_on = on
        step()
        assert asked == ([0] if on else [])


def test_while_hints_do_not_pay_a_devices_step_makes_the_calls_of_no_foresight() -> None:
    def steps(cache: DeviceCache, device: FakeDevice) -> None:
        for _ in range(3):
            cache.begin_step([0])
            cache.before_launch()
            FakeStep(cache.table, [{0: 1, 3: 2}, {5: 1}]).give(device.lanes[0])
            cache.after_launch()
            cache.poll()
            cache.end_step()

    devices = FakeDevice(), FakeDevice()
    bare, foreseeing = (make_cache(4, device) for device in devices)
    foreseeing.lookahead, foreseeing.routes = (tried := Tried(Names())), lambda: lambda layer: [0]
    tried.payoff.is_on = False
    without, off = (calls_of(partial(steps, *both)) for both in zip((bare, foreseeing), devices, strict=True))
    assert without == off and off["expertd_engine.experts.device_steps", "DeviceSteps.poll"] == 3
