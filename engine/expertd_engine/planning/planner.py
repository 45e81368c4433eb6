"""From a budget to a plan: bytes for experts and KV, slots of each layer, predicted speed, hit rate and quality. Pure.

Exact mode has one cache for the whole model: which layer has how many experts in it is what traffic makes of it, and a
fixed split can only lose. Virtual mode holds a set for each layer, and there the split is solved for (`split`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from expertd_engine.config import Size
from expertd_engine.errors import BudgetError, UsageError
from expertd_engine.experts.virtual_room import VirtualRoom
from expertd_engine.messages import ExpertMode
from expertd_engine.planning.profile import MissCurve, ModelProfile, Profile, at_share
from expertd_engine.planning.split import Gain, last_gains, split_slots
from expertd_engine.planning.startup_plan import Asked, Measured, StartupPlan, plan_memory

SPREAD = 0.015
"""Of memory: what daemons used at their peaks, all contexts full and all sequences decoding, was 0.992 to 1.010 of the
sum of their parts."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for; sizes as on the command line."""

    mode: ExpertMode = "exact"
    memory_budget: Size | None = None
    expert_budget: Size | None = None
    kv_budget: Size | None = None
    max_model_len: int | None = None
    max_sequences: int | None = None
    share: float = 0.75
    """Of the expert budget, for virtual sets."""
    routing: str = "model"


@dataclass(frozen=True, slots=True)
class Plan:
    mode: ExpertMode
    expert_budget_bytes: int
    kv_blocks: int
    memory_bytes: int
    """Predicted use of all processes, at most."""
    slots: list[int]
    """By MoE layer. Exact mode: what an even share of the one cache would be."""
    hit_rate: float
    """Of lookups; in virtual mode 1."""
    step_s: float
    """Decode of one sequence, a token."""
    divergence: float
    """KL from exact mode, nats a token."""
    gains: list[Gain]
    """Virtual mode: the last slot that each layer was given, or the last path."""

    @property
    def tok_s(self) -> float:
        return 1 / self.step_s


def make_plan(profile: Profile, request: Request) -> Plan:
    """Raises BudgetError, with the smallest budget that works, for one that is too small, and UsageError for virtual
    mode of a model that was profiled without."""
    startup = plan_memory(_measured(profile, request), _asked(profile, request))
    experts = startup.expert_budget_bytes
    memory = _memory(profile, startup)
    if request.mode == "virtual":
        slots = virtual_slots(profile, experts, request.share)
        loss, gains = profile.model.loss(slots), _gains(profile.model, slots)
        step_s = profile.box.virtual_s or profile.box.step_s
        return Plan("virtual", experts, startup.kv_blocks, memory, slots, 1.0, step_s, loss, gains)
    hit_rate, step_s = predict_exact(profile, profile.curve(request.routing), experts)
    even = [min(count, int(count * experts / profile.expert_bytes)) for count in profile.num_experts]
    return Plan("exact", experts, startup.kv_blocks, memory, even, hit_rate, step_s, 0.0, [])


def _memory(profile: Profile, startup: StartupPlan) -> int:
    """What all processes use at most; a budget is kept to, as serving keeps to it."""
    memory = profile.memory
    parts = memory.base + memory.step + startup.expert_budget_bytes + startup.kv_blocks * memory.kv_block
    return min(int((1 + SPREAD) * parts), startup.memory_budget_bytes or sys.maxsize)


def predict_exact(profile: Profile, curve: MissCurve, expert_bytes: int) -> tuple[float, float]:
    """Hit rate, and seconds of one sequence's decode step, in an expert budget."""
    hit_rate, missing = at_share(curve, expert_bytes / profile.expert_bytes)
    box = profile.box
    return hit_rate, box.step_s + box.leave_s * sum(missing) + box.overlap * missing_s(missing, box.reads_s)


def missing_s(missing: Sequence[float], reads_s: Sequence[float]) -> float:
    """Seconds that a token's missing records take to read when nothing else runs: as `MissCurve.missing`, and
    `BoxProfile.reads_s`, beyond whose end reads go on at the pace of its last ones."""
    more = reads_s[-1] - reads_s[-2] if len(reads_s) > 1 else reads_s[-1]
    seconds = [
        reads_s[n] if n < len(reads_s) else reads_s[-1] + more * (n + 1 - len(reads_s)) for n in range(len(missing))
    ]
    return sum(layers * each for layers, each in zip(missing, seconds, strict=True))


def virtual_slots(profile: Profile, expert_bytes: int, share: float) -> list[int]:
    """Slots of each layer for virtual mode, as serving gives them; of whole paths, as many in each. Raises BudgetError,
    and UsageError for a model whose profile has nothing of it."""
    model, record_bytes, experts = profile.model, profile.record_bytes, profile.num_experts
    if not model.has_virtual:
        raise UsageError(
            "--expert-mode virtual is not allowed for this model: its profile has no curves to plan by. Either it has "
            "no virtual mode: give exact; or an older expertd made the profile: make it anew with `expertd profile`"
        )
    divide = None if model.paths else lambda nbytes: split_slots(model.layers, record_bytes, nbytes)
    room = VirtualRoom(record_bytes, experts, profile.top_k, share, experts, divide)
    slots = room.slots(expert_bytes)
    if slots is None:
        raise BudgetError("expert budget for virtual mode", expert_bytes, room.minimum_bytes, _held(profile))
    return [min(slots)] * len(slots) if model.paths else slots


def _held(profile: Profile) -> str:
    """What virtual mode cannot do without."""
    return f"{profile.top_k} slots in each of {len(profile.record_bytes)} MoE layers and two to load through"


def _gains(model: ModelProfile, slots: Sequence[int]) -> list[Gain]:
    if model.paths is None:
        return last_gains(model.layers, slots)
    count = min(slots)
    return [Gain(None, count, model.paths.loss(count - 1) - model.paths.loss(count))] if count > 1 else []


def _measured(profile: Profile, request: Request) -> Measured:
    memory = profile.memory
    minimum = min(2 * max(profile.record_bytes), profile.expert_bytes)
    needed = {}
    if request.mode == "virtual":
        minimum = min(profile.expert_bytes, profile.top_k * sum(profile.record_bytes) + minimum)
        needed = {"experts_needed": _held(profile)}
    return Measured(
        base=memory.base,
        step=memory.step,
        experts_minimum=minimum,
        experts_total=profile.expert_bytes,
        kv_block=memory.kv_block,
        block_tokens=memory.block_tokens,
        available=memory.available,
        **needed,
    )


def _asked(profile: Profile, request: Request) -> Asked:
    memory = profile.memory
    return Asked(
        request.expert_budget,
        request.memory_budget,
        request.kv_budget,
        request.max_model_len or memory.max_model_len,
        request.max_sequences or memory.max_sequences,
    )
