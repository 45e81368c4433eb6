"""Activation statistics of a dense model: how much each neuron does on each domain, and which neurons work together.

A neuron's *energy* on a token is |activation| · ‖its column of down_proj‖: the size of what it adds to the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertd_engine.console import Progress, silent
from expertd_engine.refactor.corpus import Corpus
from expertd_engine.refactor.dense import Dense, activation


@dataclass(frozen=True)
class Statistics:
    """`energy` `[domains, layers, neurons]`: means over tokens. `samples` `[layers, neurons, tokens]`: energies on some
    tokens of all domains, for finding neurons that work together.
    """

    energy: Tensor
    samples: Tensor


@contextmanager
def probe(dense: Dense) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While the block runs, each forward pass of the dense model leaves `(hidden [T, H], energy [T, N])` of every
    layer, in order; the reader empties the list.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    norms = [layer.mlp.down_proj.weight.float().norm(dim=0) for layer in dense.layers]

    def hook(layer: int) -> Any:
        def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen.append((hidden, activation(module, hidden).float().abs() * norms[layer]))

        return see

    handles = [layer.mlp.register_forward_pre_hook(hook(i)) for i, layer in enumerate(dense.layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gather(
    dense: Dense,
    corpus: Corpus,
    *,
    windows: int = 16,
    length: int = 1024,
    sampled_tokens: int = 1024,
    seed: int = 0,
    progress: Progress = silent,
) -> Statistics:
    """Run `windows` training windows of `length` tokens of every domain through the dense model."""
    device = dense.device
    generator = np.random.default_rng(seed)
    energies, samples = [], []
    each = -(-sampled_tokens // (len(corpus.domains) * windows))
    with torch.inference_mode(), probe(dense) as seen:
        for number, domain in enumerate(corpus.domains):
            total = torch.zeros(len(dense.layers), dense.neurons, dtype=torch.float64, device=device)
            tokens = corpus.train[domain]
            for window in range(windows):
                start = int(generator.integers(0, len(tokens) - length + 1))
                ids = torch.from_numpy(tokens[start : start + length].astype(np.int64)).to(device)
                dense.model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
                energy = torch.stack([one for _, one in seen])
                seen.clear()
                total += energy.mean(dim=1)
                picked = torch.from_numpy(generator.choice(length, min(each, length), replace=False)).to(device)
                samples.append(energy[:, picked].half().cpu())
                progress("activations", (number + (window + 1) / windows) / len(corpus.domains))
            energies.append(total.cpu() / windows)
    return Statistics(torch.stack(energies).float(), torch.cat(samples, dim=1).transpose(1, 2).contiguous())


def gather_into(path: Path, dense: Dense, corpus: Corpus, **settings: Any) -> Statistics:
    """`gather`, or what an earlier run left at `path`."""
    if path.is_file():
        stored = load_file(path)
        return Statistics(stored["energy"], stored["samples"])
    found = gather(dense, corpus, **settings)
    partial = path.with_suffix(".partial")
    save_file({"energy": found.energy, "samples": found.samples}, partial)
    partial.rename(path)
    return found
