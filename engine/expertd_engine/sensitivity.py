"""What a model loses by a smaller budget, measured on text through the real engine: misses, and divergence by layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from expertd_engine.bench.routing import RoutingShape, make_routing
from expertd_engine.calibration import RouteRecorder, SomeLayers, TextEngine, Told, Window, with_paths, with_slots
from expertd_engine.config import Config
from expertd_engine.console import Progress
from expertd_engine.errors import BudgetError, UsageError
from expertd_engine.experts.lookahead import EveryExpert
from expertd_engine.experts.policy import serving_policy
from expertd_engine.experts.store import ExpertStore
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.planning.profile import LayerCurve, MissCurve, ModelProfile, PathCurve
from expertd_engine.planning.replay import Choice, Met, Routes, replay_exact, replay_virtual
from expertd_engine.startup_parts import policy_name
from expertd_engine.step_costs import NOT_COUNTED, StepCosts

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of all expert bytes, at which routes are replayed."""
SLOTS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of top-k, at which virtual mode is replayed, or run where it is of whole paths; and all."""
SENSITIVE_AT = 2.0
"""Slots, of top-k, at which a layer's substitutions are measured by what they do to the output."""
LEAST_MASS = 1e-6
"""Below it, divergence is not the substitutions'."""


class ModelMeasure:
    """Measures one model by one engine. Exact mode on the windows comes first, and is what all else is held against."""

    def __init__(
        self, text: TextEngine, store: ExpertStore, config: Config, windows: Sequence[Window], costs: StepCosts
    ) -> None:
        index = store.index
        self._costs = costs
        self._text = text
        self._windows = windows
        self._top_k = index.top_k
        self._record_bytes = [index.record_bytes(i) for i in range(len(index.layers))]
        self._experts = [layer.num_experts for layer in index.layers]
        self._total = index.expert_bytes_total()
        self._policy = policy_name(config)
        every = set(self._experts) == {self._top_k}
        self._cycle = EveryExpert(len(self._experts), self._top_k, 0) if every else None
        """What is foreseen where every token chooses every expert."""
        self._choices: list[list[Choice]] = []
        self.exact = self._record()

    def profile(self, progress: Progress, routings: Sequence[str] = ()) -> ModelProfile:
        """Everything about the model. Misses are told of its own routes, and of generated `routings` as for `bench`."""
        costs = self._costs
        own = self._miss_curve("model", costs.routes, NOT_COUNTED, costs.stream)
        misses, layers = [own, *(self._generated(name) for name in routings)], []
        for number in range(len(self._experts) if self._text.virtual is not None else 0):
            progress("layers", number / len(self._experts))
            layers.append(self._layer(number))
        return ModelProfile(sum(map(len, self._windows)), misses, layers, self._path_curve(progress))

    # ------------------------------------------------------------ exact mode

    def _record(self) -> Told | None:
        """What is said, while it is kept what layers choose; None for a model without virtual mode."""
        if self._text.virtual is None:
            return None if self._text.paths is None else self._text.tell(self._windows)
        recorder = RouteRecorder(self._text.virtual)
        told = self._text.tell(self._windows, recorder, settle=False)
        self._choices = recorder.choices
        return told

    def _generated(self, name: str) -> MissCurve:
        shape = RoutingShape(len(self._experts), max(self._experts), self._top_k)
        routing = make_routing(name, shape)
        if routing is None:
            raise UsageError(f"routing {name!r} is the model's own, which is always profiled")
        routes = routing.stream(0).take(len(self._costs.routes)).tolist()
        return self._miss_curve(name, routes, len(routes) // 4, 0)

    def _miss_curve(self, name: str, routes: Routes, warm: int, stream: int) -> MissCurve:
        """Of routes whose first `warm` tokens do not count; of each `stream`, if that is above 0."""
        met = {share: found for share in SHARES if (found := self._replay(share, routes, warm, stream)) is not None}
        rates = [found.hit_rate for found in met.values()]
        return MissCurve(name, list(met), rates, [found.missing() for found in met.values()])

    def _replay(self, share: float, routes: Routes, warm: int, stream: int) -> Met | None:
        """None for a share below what any budget may be."""
        policy, budget = serving_policy(self._policy, self._experts, self._top_k), int(share * self._total)
        try:
            return replay_exact(routes, self._record_bytes, self._experts, budget, policy, warm, self._cycle, stream)
        except BudgetError:
            return None

    # ------------------------------------------------------------ virtual mode

    def _layer(self, number: int) -> LayerCurve:
        virtual = self._virtual()
        sets, slots = virtual.held.sets, self._measured_slots(self._experts[number])
        tokens = self._choices[number]
        mass = [
            replay_virtual(tokens, sets.priors[number], self._top_k, n, sets.limits, len(tokens) // 4) for n in slots
        ]
        return LayerCurve(slots, mass, self._sensitivity(number))

    def _measured_slots(self, experts: int) -> list[int]:
        return sorted({min(experts, max(self._top_k, round(f * self._top_k))) for f in SLOTS} | {experts})

    def _sensitivity(self, number: int) -> float:
        """Divergence of the output for each unit of mass that this layer alone substitutes; 0 where it does none."""
        if self._sensitive_slots(number) == self._experts[number]:
            return 0.0
        slots = [self._sensitive_slots(layer) for layer in range(len(self._experts))]
        routing = SomeLayers(with_slots(self._virtual(), slots), [number])
        told = self._text.tell(self._windows, routing)
        routing.held.close()
        mass = routing.counts.mass[number] / max(1, routing.counts.tokens)
        return self._divergence(told) / mass if mass > LEAST_MASS else 0.0

    def _sensitive_slots(self, layer: int) -> int:
        return min(self._experts[layer], max(self._top_k + 1, round(SENSITIVE_AT * self._top_k)))

    def _path_curve(self, progress: Progress) -> PathCurve | None:
        """Where virtual mode is of whole paths: with so many of them."""
        model = self._text.paths
        if model is None:
            return None
        *fewer, all_paths = self._measured_slots(min(self._experts))
        mass, divergence = [], []
        for done, count in enumerate(fewer):
            progress("paths", done / len(fewer))
            lost, diverged = self._with_paths(model, count)
            mass.append(lost)
            divergence.append(diverged)
        return PathCurve([*fewer, all_paths], [*mass, 0.0], [*divergence, 0.0])

    def _with_paths(self, model: PathRouting, count: int) -> tuple[float, float]:
        """Substituted mass of a token, and divergence."""
        routing = with_paths(model, count)
        told = self._text.tell(self._windows, routing)
        routing.held.close()
        return statistics.fmean(routing.counts.mass) / max(1, routing.counts.tokens), self._divergence(told)

    def _divergence(self, told: Told) -> float:
        """From exact mode, nats a token."""
        assert self.exact is not None, "only asked for where there is virtual mode"
        return statistics.fmean(self.exact.divergences(told))

    def _virtual(self) -> VirtualRouting:
        virtual = self._text.virtual
        assert virtual is not None, "only asked for where there is virtual mode"
        return virtual
