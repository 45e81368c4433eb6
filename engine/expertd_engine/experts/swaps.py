"""What virtual mode's sets ask of whoever loads experts, and how fast they may follow the text. Pure: words alone."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from expertd_engine.experts.events import ExpertId


@dataclass(frozen=True, slots=True)
class SwapLimits:
    """How fast held sets may follow the text."""

    half_life: float = 16.0
    """Tokens of one sequence after which an observation counts half. On routes of converted models 16 to 24 substitute
    least; 4 and 64 substitute 5 to 10 % more."""
    hysteresis: float = 0.25
    """A newcomer's score must be above the victim's by this share. Against none it saves half the swaps and substitutes
    2 % more."""
    per_step: int = 1
    """Swaps that one layer may begin after a step; 0: none."""
    ahead: int = 2
    """Swaps that one layer may begin in a step, before the step comes to it, where that is foreseen."""
    in_flight: int = 1
    """Loads under way at once in all layers, but for those without which no token could be computed."""
    foreseen: int = 0
    """Swaps that all layers together may begin as a step begins, where its tokens tell what they will ask for."""

    def __post_init__(self) -> None:
        counts_are_sound = min(self.per_step, self.ahead, self.foreseen) >= 0 and self.in_flight >= 1
        if not (self.half_life > 0 and self.hysteresis >= 0 and counts_are_sound):
            raise ValueError(
                f"{self} is not allowed: half_life > 0, hysteresis, per_step, ahead, foreseen ≥ 0, in_flight ≥ 1"
            )


class Hold(msgspec.Struct, frozen=True, gc=False):
    """Bring the expert into memory and keep it there until `Release`; answered by `arrived` or `failed`."""

    expert: ExpertId


class Release(msgspec.Struct, frozen=True, gc=False):
    """The expert may go; it is not among the held any more."""

    expert: ExpertId


class Swap(msgspec.Struct, frozen=True, gc=False):
    """The victim goes at once, and the newcomer comes into its room: answered as `Hold`."""

    newcomer: ExpertId
    victim: ExpertId


Action = Hold | Release
