"""The training loop: alternating router and expert stages, resumable, with a curve. Owns optimisers and checkpoints."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd_engine.console import Progress, silent
from expertd_engine.errors import ModelError
from expertd_engine.refactor.corpus import Corpus
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.loss import distillation, index_loss, language_loss
from expertd_engine.refactor.shape import Routing
from expertd_engine.refactor.statistics import probe
from expertd_engine.refactor.student import Student, expert_masks

_CHECK_EVERY = 20
_SAVE_EVERY_S = 60.0
_GATE_TEMPER = 0.5
"""Distilled gates are softened by this much, so that chosen experts begin with weights of one size."""


class TrainingError(ModelError):
    """Training cannot go on; what was learned until the last checkpoint is kept."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. A step takes `rows` windows of `length` tokens, `micro_rows` at a time."""

    steps: int
    learning_rate: float
    router_steps: int = 200
    router_rate: float = 1e-3
    rounds: int = 2
    rows: int = 48
    micro_rows: int = 24
    length: int = 1024
    warmup_share: float = 0.05
    end_share: float = 0.05
    """Of the learning rate, at the end of its cosine; 1 keeps it, for a run that others go on from."""
    distillation: float = 0.5
    """Share of the loss that is the teacher's distribution."""
    overlap_share: float = 0.25
    """Share of an index router's loss that is the overlap of activations; the rest is the text's domain."""
    balance: float = 0.0
    """Weight of layers' own routers' imbalance in the loss of the expert stage."""
    labelled: float = 0.0
    """Share of an index's expert stage, from its beginning, in which texts' domains stand in for the router."""
    seed: int = 0
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    compile: bool = False

    def plan(self, routed: bool) -> list[tuple[str, int]]:
        """`(stage, steps)` in order: in each round first the router, then the experts."""
        rounds = self.rounds if routed else 1
        plan = []
        for number in range(rounds):
            plan += [("router", self.router_steps // rounds)] if routed else []
            plan += [("experts", self.steps * (number + 1) // rounds - self.steps * number // rounds)]
        return plan


@dataclass
class Curve:
    """`(step, loss)` of every stage, and what it took."""

    experts: list[tuple[int, float]] = field(default_factory=list)
    router: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains `student` on `corpus`; `dense` is the model that activations come from, `teacher` whose logits teach."""

    def __init__(
        self,
        student: Student,
        corpus: Corpus,
        recipe: Recipe,
        *,
        dense: Dense,
        teacher: Student | None = None,
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.student, self.corpus, self.recipe = student, corpus, recipe
        self.dense, self.teacher, self.checkpoint, self.progress = dense, teacher, checkpoint, progress
        self.device = student.head.device
        self.curve = Curve()
        self._done = {"router": 0, "experts": 0}
        self._tempered = False
        self._saved_at = time.monotonic()
        self._optimisers = {
            "experts": _adam(student.expert_parameters(), recipe.learning_rate, self.device),
            "router": _adam(student.router_parameters(), recipe.router_rate, self.device),
        }
        self._loss = torch.compile(language_loss) if recipe.compile else language_loss
        if recipe.compile:
            for model in (student, teacher):
                if model is not None:
                    model.compile()
        self._masks: Tensor | None = None

    def run(self) -> Curve:
        """Train to the end, from the checkpoint if there is one. Raises TrainingError for a loss that is no number."""
        self._resume()
        begun = time.monotonic()
        ends = {"router": 0, "experts": 0}
        for stage, steps in self.recipe.plan(bool(self.student.router_parameters())):
            ends[stage] += steps
            self._stage(stage, ends[stage])
        self.curve.seconds += time.monotonic() - begun
        self._save()
        return self.curve

    def _stage(self, stage: str, end: int) -> None:
        optimiser = self._optimisers[stage]
        total = self.recipe.steps if stage == "experts" else self.recipe.router_steps
        seed = self.recipe.seed * 2 + (stage == "router")
        batches = self.corpus.batches(self.recipe.rows, self.recipe.length, seed, self.recipe.domain_weights or None)
        since: list[Tensor] = []
        for step, batch in enumerate(itertools.islice(batches, self._done[stage], end), self._done[stage]):
            _set_rate(optimiser, _schedule(step, total, self.recipe.warmup_share, self.recipe.end_share))
            since.append(self._step(stage, batch))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self._done[stage] = step + 1
            self.curve.tokens += self.recipe.rows * self.recipe.length * (stage == "experts")
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == end:
                self._note(stage, step + 1, total, since)
        if stage == "router" and not self._tempered:
            self._temper()

    def _step(self, stage: str, batch: Any) -> Tensor:
        tokens, labels = (_moved(torch.from_numpy(part), self.device) for part in batch)
        parameters = self._optimisers[stage].param_groups[0]["params"]
        total = torch.zeros((), device=self.device)
        count = -(-len(tokens) // self.recipe.micro_rows)
        # Rows come sorted by domain: taken in strides, all parts have texts, and so work for experts, of all of them.
        parts = [(tokens[number::count], labels[number::count]) for number in range(count)]
        for ids, domains in parts:
            loss = self._expert_loss(ids, domains) if stage == "experts" else self._router_loss(ids, domains)
            (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return total

    def _expert_loss(self, ids: Tensor, domains: Tensor) -> Tensor:
        labels = ids[:, 1:].reshape(-1)
        forced = domains[:, None].expand_as(ids[:, :-1]) if self._labelled() else None
        taught = None
        with self._precision():
            if self.teacher is not None and self.recipe.distillation:
                with torch.no_grad():
                    taught = self.teacher.logits(ids[:, :-1]).flatten(0, 1)
            hidden = self.student.hidden(ids[:, :-1], forced).flatten(0, 1)
            head = self.student.head.to(hidden.dtype)
            loss = self._loss(hidden, head, labels, taught, self.recipe.distillation, self.student.softcap)
        return loss + self.recipe.balance * self.student.imbalance() if self.recipe.balance else loss

    def _labelled(self) -> bool:
        """Whether the step that runs is one whose routes are its texts' domains."""
        shape = self.student.shape
        if shape is None or shape.routing != Routing.INDEX:
            return False
        return self._done["experts"] < self.recipe.labelled * self.recipe.steps

    def _router_loss(self, ids: Tensor, domains: Tensor) -> Tensor:
        ids = ids[:, :-1]
        shape = self.student.shape
        assert shape is not None
        if shape.routing == Routing.INDEX:
            overlaps = self._scores(ids).sum(dim=0) if self.recipe.overlap_share else None
            with self._precision():
                logits = self.student.route_logits(ids).flatten(0, 1)
            labels = domains[:, None].expand_as(ids).reshape(-1)
            return index_loss(logits, labels, overlaps, self.recipe.overlap_share)
        if shape.routing == Routing.HEADS:
            scores = self._scores(ids)
            with self._precision():
                logits = self.student.route_logits(ids).flatten(0, 1)
            return distillation(logits.view(len(logits), -1, shape.experts).transpose(0, 1), scores)
        seen = self._probed(ids)
        gates = [block.gate for block in self.student.blocks if block.gate is not None]
        pairs = zip(gates, seen, self._energy_scores(seen), strict=True)
        with self._precision():
            losses = [distillation(gate(hidden), scores) for gate, (hidden, _), scores in pairs]
        return torch.stack(losses).mean()

    def _scores(self, ids: Tensor) -> Tensor:
        """`[layers, N, E]`: the share of each token's energy in the dense model that each expert's neurons hold."""
        return torch.stack(self._energy_scores(self._probed(ids)))

    def _energy_scores(self, seen: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if self._masks is None:
            assert self.student.selection is not None
            self._masks = expert_masks(self.student.selection, self.dense.neurons).to(self.device)
        return [(energy / energy.sum(-1, keepdim=True)) @ self._masks[i] for i, (_, energy) in enumerate(seen)]

    def _probed(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad(), self._precision(), probe(self.dense) as seen:
            self.dense.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            return list(seen)

    def _precision(self) -> Any:
        if self.student.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.student.compute_dtype)

    def _temper(self) -> None:
        """Once, soften distilled gates whose weights scale experts; an index has none."""
        self._tempered = True
        shape = self.student.shape
        assert shape is not None
        if not shape.weighted:
            return
        gates = [self.student.router.head.weight] if self.student.router else self.student.router_parameters()
        for weight in gates:
            weight.data *= _GATE_TEMPER

    def _note(self, stage: str, step: int, total: int, since: list[Tensor]) -> None:
        loss = float(torch.stack(since).mean())
        since.clear()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of the {stage} stage is {loss} near step {step} of {total}: lower the learning rate "
                f"({self._optimisers[stage].defaults['lr']:g}); the state of the last checkpoint is kept"
            )
        getattr(self.curve, stage).append((step, loss))
        self.progress(stage, step / total)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.checkpoint is None:
            return
        state = {
            "done": self._done,
            "tempered": self._tempered,
            "trained": self.student.trained(),
            "optimisers": {name: one.state_dict() for name, one in self._optimisers.items()},
            "curve": asdict(self.curve),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self._done, self._tempered, self.curve = state["done"], state["tempered"], Curve(**state["curve"])
        self.student.load_trained(state["trained"])
        for name, one in self._optimisers.items():
            one.load_state_dict(state["optimisers"][name])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _adam(parameters: list[torch.nn.Parameter], rate: float, device: torch.device) -> torch.optim.AdamW:
    found = parameters or [torch.nn.Parameter(torch.zeros(1, device=device))]  # a model without a router has none
    return torch.optim.AdamW(found, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def _set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = optimiser.defaults["lr"] * factor


def _schedule(step: int, total: int, warmup_share: float, end_share: float) -> float:
    """Linear warm-up, then a cosine down to `end_share`."""
    warmup = max(1, int(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return end_share + (1 - end_share) * 0.5 * (1 + math.cos(math.pi * done))
