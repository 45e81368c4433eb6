"""Whether there is a card to compute on. Asked before anything is fetched or prepared for one, and by each engine."""

from __future__ import annotations

import torch

from expertd_engine.errors import ConfigError


def find_card() -> torch.device | None:
    """The one that computes; None: there is none that PyTorch can use."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def require_card() -> torch.device:
    """The one that computes. Raises ConfigError where there is none."""
    card = find_card()
    if card is None:
        raise ConfigError(
            "device: 'cuda' is not allowed: PyTorch finds no CUDA device here; give 'cpu', or 'auto', which takes a "
            "card where there is one"
        )
    return card
