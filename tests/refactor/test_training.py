"""Statistics, selection and training: what they learn, what stops them, and that a stopped run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from expertd_engine.errors import ModelError
from expertd_engine.refactor.dense import activation, find_layers
from expertd_engine.refactor.evaluation import evaluate
from expertd_engine.refactor.feed_forward import imbalance
from expertd_engine.refactor.selection import select
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.statistics import probe
from expertd_engine.refactor.student import Student
from expertd_engine.refactor.training import Curve, Recipe, Trainer, TrainingError, _schedule
from expertd_engine.refactor.upcycle import upcycled
from refactor.tiny import HEADS, INDEX, LAYERS, LOW_RANK, corpus, dense, statistics

RECIPE = Recipe(steps=40, learning_rate=2e-3, router_steps=60, rows=6, micro_rows=3, length=32)


def _student(shape: Shape | None, seed: int = 0) -> Student:
    return Student(dense(), shape, None if shape is None else select(statistics(), shape, seed), seed)


def _train(student: Student, recipe: Recipe = RECIPE, **settings: Path | None) -> Curve:
    return Trainer(student, corpus(), recipe, dense=dense(), **settings).run()  # type: ignore[arg-type]  # mypy joins the values' types


def test_energy_is_activation_times_column_norm() -> None:
    ids = torch.arange(20)[None]
    mlp = dense().layers[1].mlp
    with torch.no_grad(), probe(dense()) as seen:
        dense().model(ids)
        hidden, energy = seen[1]
        torch.testing.assert_close(energy, activation(mlp, hidden).abs() * mlp.down_proj.weight.norm(dim=0))
    assert statistics().energy.shape == (3, 3, 128)


def test_experts_hold_their_domains_strongest_neurons_and_share_none_with_the_permanent_part() -> None:
    selection = select(statistics(), INDEX)
    for layer in range(3):
        permanent = set(selection.permanent[layer].tolist())
        for domain in range(3):
            own = set(selection.experts[layer, domain].tolist())
            assert len(own) == 48 and not own & permanent
            rest = [n for n in range(128) if n not in own | permanent]
            energy = statistics().energy[domain, layer]
            assert energy[sorted(own)].min() >= energy[rest].max()


def test_clusters_are_disjoint_and_of_one_size() -> None:
    selection = select(statistics(), LAYERS)
    for layer in range(3):
        everything = torch.cat([selection.permanent[layer], selection.experts[layer].flatten()]).tolist()
        assert len(everything) == len(set(everything)) == 16 + 8 * 14
    with pytest.raises(ModelError, match="asked of an FFN of 128"):
        select(statistics(), dataclasses.replace(LAYERS, from_dense=16, permanent=32))
    with pytest.raises(ModelError, match="4 experts, 3 domains"):
        select(statistics(), dataclasses.replace(INDEX, experts=4))


@pytest.mark.parametrize("shape", [None, INDEX, LOW_RANK, HEADS, LAYERS], ids=str)
def test_training_helps(shape: Shape | None) -> None:
    student = _student(shape)
    before = evaluate(student, corpus(), windows=4, length=64).mean_perplexity
    curve = _train(student)
    after = evaluate(student, corpus(), windows=4, length=64).mean_perplexity
    assert after < before
    assert curve.tokens == 40 * 6 * 32 and [step for step, _ in curve.experts] == [20, 40]


def test_imbalance_is_one_when_even_and_the_number_of_experts_when_one_gets_all() -> None:
    even, greedy = torch.zeros(8, 4), torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4)
    torch.testing.assert_close(imbalance(even, torch.tensor([2, 4, 6, 8], dtype=torch.int32)), torch.tensor(1.0))
    torch.testing.assert_close(imbalance(greedy, torch.tensor([8, 8, 8, 8], dtype=torch.int32)), torch.tensor(4.0))


def test_the_loss_can_ask_for_balance() -> None:
    spread = {}
    for balance in (0.0, 1.0):
        student = _student(LAYERS)
        _train(student, dataclasses.replace(RECIPE, balance=balance))
        with torch.inference_mode():
            student.logits(torch.from_numpy(next(corpus().batches(12, 32, seed=9))[0]))
            spread[balance] = float(student.imbalance())
    assert spread[1.0] < spread[0.0] - 0.01


def test_the_router_learns_the_domains() -> None:
    student = _student(INDEX)
    _train(student, dataclasses.replace(RECIPE, steps=2, router_steps=120, router_rate=1e-2, overlap_share=0.0))
    with torch.inference_mode():
        for number, domain in enumerate(corpus().domains):
            ids = torch.from_numpy(corpus().windows(domain, 4, 64))
            assert (student.route_logits(ids).argmax(dim=-1) == number).float().mean() > 0.9


def test_experts_begin_as_copies_of_the_pruned_ffn_whatever_the_route() -> None:
    pruned = _student(Shape(Routing.NONE, 64))
    _train(pruned, dataclasses.replace(RECIPE, steps=4))
    grown = upcycled(pruned, INDEX, dense(), statistics())
    ids = torch.arange(20)[None]
    for routes in (None, torch.full_like(ids, 2)):
        torch.testing.assert_close(grown.logits(ids, routes), pruned.logits(ids), rtol=1e-4, atol=1e-4)
    assert grown.selection is not None
    assert torch.equal(grown.selection.experts[:, 0], grown.selection.experts[:, 2])


@pytest.mark.parametrize("shape", [HEADS, LOW_RANK, dataclasses.replace(INDEX, permanent=24)], ids=lambda s: s.routing)
def test_experts_that_cannot_be_copies_are_refused(shape: Shape) -> None:
    with pytest.raises(ModelError, match="copies of a pruned FFN"):
        upcycled(_student(Shape(Routing.NONE, 64)), shape, dense(), statistics())


def test_copies_leave_out_the_neurons_with_least_energy() -> None:
    grown = upcycled(_student(Shape(Routing.NONE, 72)), INDEX, dense(), statistics())
    best = select(statistics(), Shape(Routing.NONE, 64)).permanent
    assert grown.selection is not None
    kept = torch.cat([grown.selection.permanent, grown.selection.experts[:, 0]], dim=1)
    assert torch.equal(kept.sort().values, best)


def test_texts_domains_stand_in_for_the_router_for_a_share_of_the_steps() -> None:
    student = _student(INDEX)
    seen = []
    student.route_logits = lambda ids: seen.append(ids) or torch.zeros(*ids.shape, 3)  # type: ignore[method-assign,func-returns-value]  # a spy
    _train(student, dataclasses.replace(RECIPE, steps=8, rounds=1, router_steps=0, micro_rows=6, labelled=0.75))
    assert len(seen) == 2


def test_a_rate_that_is_kept_does_not_fall() -> None:
    rates = [_schedule(step, 20, 0.1, 1.0) for step in range(20)]
    assert rates[1:] == [1.0] * 19 and rates[0] == 0.5
    assert _schedule(19, 20, 0.1, 0.05) < 0.06


def test_low_rank_training_leaves_frozen_weights_alone() -> None:
    student = _student(LOW_RANK)
    frozen = {name: one.clone() for name, one in student.named_buffers()}
    embedding = student.head.clone()
    _train(student)
    assert frozen and all(torch.equal(one, frozen[name]) for name, one in student.named_buffers())
    assert torch.equal(student.head, embedding)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _student(LAYERS)
    _train(whole)
    monkeypatch.setattr("expertd_engine.refactor.training._SAVE_EVERY_S", 0.0)
    stopped = Trainer(_student(LAYERS), corpus(), RECIPE, dense=dense(), checkpoint=tmp_path / "state.pt")
    stopped.progress = _stop_at(0.5)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = _student(LAYERS)
    curve = _train(again, checkpoint=tmp_path / "state.pt")
    assert curve.tokens == 40 * 6 * 32
    for name, tensor in again.trained().items():
        torch.testing.assert_close(tensor, whole.trained()[name], rtol=1e-5, atol=1e-6)


def _stop_at(fraction: float):  # type: ignore[no-untyped-def]  # a closure of one use
    seen = []

    def progress(stage: str, done: float) -> None:
        seen.append(stage)
        if stage == "experts" and done > fraction:
            raise KeyboardInterrupt

    return progress


def test_a_loss_that_is_no_number_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss of the experts stage is nan .* lower the learning rate \(1e\+30\)"):
        _train(_student(Shape(Routing.NONE, permanent=64)), dataclasses.replace(RECIPE, learning_rate=1e30))


def test_a_model_without_a_known_ffn_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match="no FFN of a known kind in 2 of 2 layers"):
        find_layers(model)


def test_a_gemma_has_ffns_that_can_be_cut() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=260, num_key_value_heads=1, head_dim=16, **sizes))
    gemma = dataclasses.replace(dense(), model=model.eval(), layers=find_layers(model))
    student = Student(gemma, None, None)
    with torch.inference_mode():
        torch.testing.assert_close(student.logits(torch.arange(9)[None]), model(torch.arange(9)[None]).logits)
