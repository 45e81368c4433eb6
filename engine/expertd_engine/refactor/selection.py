"""Which neurons become which expert. Pure functions of activation statistics; indices are aligned across layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_engine.errors import ModelError
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.statistics import Statistics

_CLUSTER_ROUNDS = 8


@dataclass(frozen=True)
class Selection:
    """Neuron numbers of the dense FFN: `permanent` `[layers, P]`, `experts` `[layers, E, from_dense]`, and `fresh`
    `[layers, E, width - from_dense]`, whose gate and up rows an expert's further neurons begin with.
    """

    permanent: Tensor
    experts: Tensor
    fresh: Tensor


def select(statistics: Statistics, shape: Shape, seed: int = 0) -> Selection:
    """The selection for a shape. Experts of one index are the domains' own neurons, which may overlap; experts of a
    finer routing are disjoint clusters of neurons that work together. ModelError when the FFN is too small.
    """
    domains, layers, neurons = statistics.energy.shape
    if shape.permanent > neurons:
        raise ModelError(f"{shape.permanent} permanent neurons asked of an FFN of {neurons}")
    permanent = _by_worst_rank(statistics.energy, shape.permanent)
    if shape.routing == Routing.NONE:
        best = mean_shares(statistics.energy).topk(shape.permanent, dim=1).indices.sort().values
        nothing = torch.zeros(layers, 0, 0, dtype=torch.int64)
        return Selection(best, nothing, nothing)
    generator = torch.Generator().manual_seed(seed)
    further = (layers, shape.experts, shape.width - shape.from_dense)
    fresh = torch.randint(neurons, further, generator=generator)
    if shape.routing == Routing.INDEX:
        if shape.experts != domains:
            raise ModelError(f"one index chooses among one expert a domain: {shape.experts} experts, {domains} domains")
        return Selection(permanent, _by_domain(statistics.energy, permanent, shape.from_dense), fresh)
    if shape.permanent + shape.experts * shape.from_dense > neurons:
        raise ModelError(
            f"{shape.permanent} permanent neurons and {shape.experts} disjoint experts of {shape.from_dense} asked "
            f"of an FFN of {neurons}"
        )
    clusters = [
        cluster(statistics.samples[layer].float(), _rest(permanent[layer], neurons), shape, seed + layer)
        for layer in range(layers)
    ]
    return Selection(permanent, torch.stack(clusters), fresh)


def mean_shares(energy: Tensor) -> Tensor:
    """`[layers, neurons]`: each neuron's share of its layer's energy, mean over domains."""
    return (energy / energy.sum(dim=2, keepdim=True)).mean(dim=0)


def _by_worst_rank(energy: Tensor, count: int) -> Tensor:
    """`[layers, count]`: the neurons that every domain ranks high, which is what masks of all domains share."""
    ranks = energy.argsort(dim=2, descending=True).argsort(dim=2)
    return ranks.amax(dim=0).argsort(dim=1, stable=True)[:, :count].sort().values


def _by_domain(energy: Tensor, permanent: Tensor, count: int) -> Tensor:
    """`[layers, domains, count]`: each domain's strongest neurons among those that are not permanent."""
    left = energy.clone()
    for layer, chosen in enumerate(permanent):
        left[:, layer, chosen] = -1.0
    return left.topk(count, dim=2).indices.sort().values.transpose(0, 1)


def _rest(permanent: Tensor, neurons: int) -> Tensor:
    kept = torch.ones(neurons, dtype=torch.bool)
    kept[permanent] = False
    return kept.nonzero().flatten()


def cluster(samples: Tensor, neurons: Tensor, shape: Shape, seed: int) -> Tensor:
    """Balanced k-means over neurons' energies on `samples` `[N, S]`: `[E, from_dense]` numbers out of `neurons`.

    Each round gives neurons to clusters in the order of how much they lose elsewhere, as long as there is room.
    """
    strongest = samples[neurons].sum(dim=1).argsort(descending=True)[: shape.experts * shape.from_dense]
    neurons = neurons[strongest.sort().values]
    features = samples[neurons] - samples[neurons].mean(dim=1, keepdim=True)
    features = torch.nn.functional.normalize(features, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = features[torch.randperm(len(neurons), generator=generator)[: shape.experts]]
    owner = torch.zeros(len(neurons), dtype=torch.int64)
    for _ in range(_CLUSTER_ROUNDS):
        owner = _balanced(features @ centres.T, shape.from_dense)
        centres = torch.zeros_like(centres).index_add_(0, owner, features)
        centres = torch.nn.functional.normalize(centres, dim=1)
    order = owner.argsort(stable=True)
    return neurons[order].view(shape.experts, shape.from_dense)


def _balanced(likeness: Tensor, size: int) -> Tensor:
    """`[N]`: each row's cluster, `size` rows to each column, by descending margin between best and mean likeness."""
    preferred = likeness.argsort(dim=1, descending=True).tolist()
    order = (likeness.amax(dim=1) - likeness.mean(dim=1)).argsort(descending=True).tolist()
    room = [size] * likeness.shape[1]
    owner = torch.empty(len(preferred), dtype=torch.int64)
    for row in order:
        chosen = next(column for column in preferred[row] if room[column])
        room[chosen] -= 1
        owner[row] = chosen
    return owner
