"""Domains for texts that name none: windows whose activations are alike. Holds no state."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from expertd_engine.console import Progress, silent
from expertd_engine.errors import ModelError
from expertd_engine.refactor.corpus import WHOLE, Corpus, Tokens
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.statistics import probe

_ROUNDS = 20


def cluster_domains(
    dense: Dense, corpus: Corpus, count: int, *, length: int, seed: int = 0, progress: Progress = silent
) -> Corpus:
    """`corpus` with its one domain `text` cut into windows of `length` tokens and these sorted into `count` domains.

    Raises ModelError when a cluster gets no window of the training or of the held-out part.
    """
    if corpus.domains != [WHOLE]:
        return corpus
    parts = {"train": corpus.train[WHOLE], "held": corpus.held_out[WHOLE]}
    windows = {part: _windows(tokens, length) for part, tokens in parts.items()}
    profiles = {part: _profiles(dense, some, progress) for part, some in windows.items()}
    centres = _centres(profiles["train"], count, seed)
    owners = {part: (some @ centres.T).argmax(dim=1).numpy() for part, some in profiles.items()}
    train, held = (
        {f"cluster-{i}": windows[part][owners[part] == i].reshape(-1) for i in range(count)}
        for part in ("train", "held")
    )
    empty = [name for name in train if not len(train[name]) or not len(held[name])]
    if empty:
        raise ModelError(
            f"{len(empty)} of {count} clusters of activations got no text: ask for fewer experts, or give more text"
        )
    return Corpus(train, held, corpus.cloze, {**corpus.made_of, "clusters": f"{count} of windows of {length}"})


def _windows(tokens: Tokens, length: int) -> NDArray[np.int64]:
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length).astype(np.int64)


def _profiles(dense: Dense, windows: NDArray[np.int64], progress: Progress) -> Tensor:
    """`[windows, layers · neurons]`: mean energies, centred by neuron over windows and of unit length."""
    found = []
    with torch.inference_mode(), probe(dense) as seen:
        for number, window in enumerate(windows):
            ids = torch.from_numpy(window)[None].to(dense.device)
            dense.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            found.append(torch.cat([energy.mean(dim=0) for _, energy in seen]).cpu())
            seen.clear()
            progress("clusters", (number + 1) / len(windows))
    profiles = torch.stack(found)
    return normalize(profiles - profiles.mean(dim=0), dim=1)


def _centres(profiles: Tensor, count: int, seed: int) -> Tensor:
    """Spherical k-means."""
    if len(profiles) < count:
        raise ModelError(f"{len(profiles)} windows of text cannot be sorted into {count} clusters: give more text")
    generator = torch.Generator().manual_seed(seed)
    centres = profiles[torch.randperm(len(profiles), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        owner = (profiles @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, owner, profiles)
        lonely = torch.bincount(owner, minlength=count) == 0
        centres = torch.where(lonely[:, None], centres, normalize(sums, dim=1))
    return centres
