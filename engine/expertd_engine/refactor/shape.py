"""What a refactored model looks like: how neurons become experts, who routes, and which weights are trained. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from expertd_engine.errors import ModelError

NEURON_MULTIPLE = 8
"""Grouped matrix products on accelerators want rows of 16 bytes."""


class Routing(StrEnum):
    """Who chooses a token's experts."""

    NONE = "none"
    """Nobody: the permanent part is all there is (static pruning, the baseline)."""
    INDEX = "index"
    """The pre-gating router: one index that holds in all layers, weight 1 (the paper's model)."""
    HEADS = "heads"
    """The pre-gating router: a choice of its own for every layer, weights normalised over the chosen."""
    LAYERS = "layers"
    """A router in every layer that sees the hidden state, as in standard MoE models; weights normalised likewise."""

    @property
    def pregated(self) -> bool:
        return self in (Routing.INDEX, Routing.HEADS)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in neurons of one layer's FFN. `rank` None trains full weights; else low-rank deltas on frozen ones."""

    routing: Routing
    permanent: int
    experts: int = 0
    top_k: int = 0
    from_dense: int = 0
    """Neurons of the dense model in each expert."""
    width: int = 0
    """Neurons of each expert; what `from_dense` leaves starts with no effect and is learned."""
    rank: int | None = None
    shared_basis: bool = False
    """Whether a layer's experts share the right factor of their deltas."""
    attention_rank: int = 32

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise ModelError(f"a refactored model cannot have this shape: {fault}")

    @property
    def active(self) -> int:
        """Neurons that a token goes through."""
        return self.permanent + self.top_k * self.width

    @property
    def weighted(self) -> bool:
        """Whether experts' outputs are weighted, so that `down` is scaled by `top_k` to begin with."""
        return self.routing in (Routing.HEADS, Routing.LAYERS)

    def _fault(self) -> str | None:
        if self.routing == Routing.NONE:
            return None if self.permanent > 0 and self.experts == 0 else "without a router there is a permanent part"
        if not 0 < self.from_dense <= self.width:
            return f"experts take {self.from_dense} of their {self.width} neurons from the dense model"
        if not 0 < self.top_k <= self.experts:
            return f"{self.top_k} of {self.experts} experts are chosen for a token"
        if self.routing == Routing.INDEX and self.top_k != 1:
            return "an index chooses one expert"
        if self.permanent % NEURON_MULTIPLE or self.width % NEURON_MULTIPLE:
            return f"parts of {self.permanent} and {self.width} neurons; both must be multiples of {NEURON_MULTIPLE}"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Shape:
        return cls(**{**fields, "routing": Routing(fields["routing"])})


def pruned_shape(active: int, extra_parameters: int, layers: int, hidden: int) -> Shape:
    """The baseline of equal active bytes: a routed model's active neurons, and as many as its router would pay for."""
    paid = -(-extra_parameters // (3 * hidden * layers))
    return Shape(Routing.NONE, permanent=-(-(active + paid) // NEURON_MULTIPLE) * NEURON_MULTIPLE)
