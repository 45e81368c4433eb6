"""What a sequence met on its way, for its usage block and its request log: experts, substitutions, times. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.messages import SequenceStats


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What one step met: lookups by result, bytes loaded on demand, seconds spent waiting for them."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    loaded_bytes: int = 0
    stall_s: float = 0.0

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            self.hits + other.hits,
            self.late + other.late,
            self.misses + other.misses,
            self.loaded_bytes + other.loaded_bytes,
            self.stall_s + other.stall_s,
        )

    def __sub__(self, other: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            self.hits - other.hits,
            self.late - other.late,
            self.misses - other.misses,
            self.loaded_bytes - other.loaded_bytes,
            self.stall_s - other.stall_s,
        )


@dataclass(frozen=True, slots=True)
class Substitutions:
    """What virtual mode did to some tokens. In exact mode all is zero."""

    choices: int = 0
    """(token, choice) pairs routed, over all layers."""
    substituted: int = 0
    """Of these: answered by another expert than the router's own."""
    mass: float = 0.0
    """Gate mass substituted, 0 to 1, on average over the layers, summed over tokens."""
    tokens: int = 0

    def __add__(self, other: Substitutions) -> Substitutions:
        return Substitutions(
            self.choices + other.choices,
            self.substituted + other.substituted,
            self.mass + other.mass,
            self.tokens + other.tokens,
        )


@dataclass(slots=True)
class StatsCollector:
    """Gathers `SequenceStats`. All times are seconds of the caller's monotonic clock.

    queue: submitted → first scheduled; prefill: → first token; decode: → end. They add up to the whole life, so a
    preempted sequence's second wait counts in the phase that it interrupts.
    """

    submitted_s: float = 0.0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens that needed no computing when the sequence was first admitted."""
    experts: ExpertCounts = ExpertCounts()
    substitutions: Substitutions = Substitutions()

    def mark_scheduled(self, now_s: float) -> bool:
        """True the first time."""
        if self.scheduled_s is not None:
            return False
        self.scheduled_s = now_s
        return True

    def mark_token(self, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s

    def result(self, end_s: float) -> SequenceStats:
        """The stats of a sequence that ends at `end_s`, wherever in its life that is."""
        scheduled_s = end_s if self.scheduled_s is None else self.scheduled_s
        first_token_s = end_s if self.first_token_s is None else self.first_token_s
        return SequenceStats(
            queue_s=scheduled_s - self.submitted_s,
            prefill_s=first_token_s - scheduled_s,
            decode_s=end_s - first_token_s,
            preemptions=self.preemptions,
            cached_tokens=self.cached_tokens,
            expert_hits=self.experts.hits,
            expert_late=self.experts.late,
            expert_misses=self.experts.misses,
            loaded_bytes=self.experts.loaded_bytes,
            stall_s=self.experts.stall_s,
            choices=self.substitutions.choices,
            substituted=self.substitutions.substituted,
            substituted_mass=self.substitutions.mass,
            virtual_tokens=self.substitutions.tokens,
        )
