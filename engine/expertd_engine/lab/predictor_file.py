"""The trained predictor that lies beside a store: its numbers, and the file that holds them. numpy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertd_engine.arrays_file import ArraysFile

PREDICTOR_NAME = "predictor.safetensors"
PREDICTOR_VERSION = 1

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """Linear in what layer l's router saw, `h` `[H]`, and in `f` `[J, E]`: how often each expert was used of late.

    Logit of expert e of the layer d + 1 behind l, for the token: `(h @ down[l]) @ up[l, :, d] + recent[l, d] @ f +
    bias[l, d]`; layers behind the last are the first ones of the next token. Logit that expert e of layer l is used
    again soon: `h @ keep[l] + keep_recent[l] @ f + keep_bias[l]`.
    """

    half_lives: Floats
    """`[J]`, in tokens: what "of late" means."""
    down: Floats
    """`[L, H, R]`"""
    up: Floats
    """`[L, R, D, E]`"""
    recent: Floats
    """`[L, D, J]`"""
    bias: Floats
    """`[L, D, E]`"""
    keep: Floats
    """`[L, H, E]`"""
    keep_recent: Floats
    """`[L, J]`"""
    keep_bias: Floats
    """`[L, E]`"""

    @property
    def leads(self) -> int:
        return int(self.up.shape[2])


class Recent:
    """Features of each expert's uses of late: log of its uses, each halved by its age, for several half-lives.

    `features` `[L, J, E]` are as of the last use of each layer.
    """

    FLOOR = np.float32(1e-3)
    """Share of tokens below which an expert counts as unused."""

    def __init__(self, half_lives: Floats, layers: int, experts: int) -> None:
        self._kept = np.exp2(-1 / half_lives)[:, None].astype(np.float32)
        self._fresh = 1 - self._kept
        self._shares = np.zeros((layers, len(half_lives), experts), np.float32)
        self.features = np.full(self._shares.shape, np.log(self.FLOOR), np.float32)

    def use(self, layer: int, experts: NDArray[np.int64]) -> None:
        """A step's tokens chose these, with repeats, in `layer`."""
        shares = self._shares[layer]
        shares *= self._kept
        shares[:, experts] += self._fresh
        np.log(shares + self.FLOOR, out=self.features[layer])


_FILE = ArraysFile.of(PREDICTOR_NAME, PREDICTOR_VERSION, Predictor, "expertd train-predictor")


def write_predictor(folder: Path, predictor: Predictor, store_id: str, told: dict[str, float]) -> Path:
    """`told`: how well it did when it was trained. Raises StoreError where the folder cannot be written to."""
    return _FILE.write(folder, predictor, store_id, {"told": json.dumps(told)})


def has_predictor(folder: Path) -> bool:
    return _FILE.is_in(folder)


def read_predictor(folder: Path, store_id: str) -> Predictor:
    """Raises StoreError where there is none, or none of this store and version."""
    return Predictor(**_FILE.read(folder, store_id))
