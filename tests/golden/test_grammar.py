"""Constraints on a real engine with a model that babbles: whatever it would rather say, the form is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from expertd_engine.errors import ModelError
from expertd_engine.grammar import DIGITS_MAX, Grammars
from expertd_engine.messages import Constraint, Sampling
from expertd_engine.prepare import prepare
from expertd_engine.request import ConstraintFailed
from expertd_engine.startup import Engine
from support.engine import Generated, generate, running_engine
from support.tiny_checkpoints import make_checkpoint
from support.tiny_families import VOCAB_SIZE

ODD_CHOICES = ['say "no"', "back\\slash", "new\nline", "日本語", "a/b", "<tag> & more"]
PROMPTS = [[*range(40 + i, 60 + 3 * i)] for i in range(4)]
CONSTRAINTS = [
    Constraint("regex", r"[0-9]{3}-(ab|cd)+x"),
    Constraint("choice", json.dumps(ODD_CHOICES)),
    Constraint("json_schema", '{"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}, '
               '"b": {"type": "boolean"}}, "required": ["n", "b"], "additionalProperties": false}'),
    Constraint("lark", 'start: "<" item ("," item)* ">"\nitem: /[a-c]{2}/'),
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", folder / "checkpoint", seed=1)
    prepare(folder / "checkpoint", folder / "store", "float32")
    return folder / "store"


@pytest.fixture(scope="module")
def engine(store: Path) -> Iterator[Engine]:
    with running_engine(store, threads=1) as engine:
        assert not [f for f in engine.info.fallbacks if "constrained" in f]
        yield engine


@pytest.fixture(scope="module")
def tokenizer(store: Path) -> Tokenizer:
    return Tokenizer.from_file(str(store / "tokenizer.json"))


def sampling(constraint: Constraint, **options: Any) -> Sampling:
    return Sampling(**{"max_tokens": 100, "seed": 3, "constraint": constraint, **options})


def reason(result: Generated) -> str:
    assert result.finished is not None
    return result.finished.reason


def text_of(tokenizer: Tokenizer, result: Generated) -> str:
    return str(tokenizer.decode(result.token_ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_kind_of_constraint_is_kept_to_the_end(engine: Engine, tokenizer: Tokenizer, temperature: float) -> None:
    results = generate(engine, PROMPTS, [sampling(c, temperature=temperature, max_tokens=200) for c in CONSTRAINTS])
    regex, choice, schema, lark = (text_of(tokenizer, result) for result in results)
    assert {reason(result) for result in results} <= {"stop", "length"}
    assert reason(results[1]) == "stop" and choice in ODD_CHOICES
    if reason(results[0]) == "stop":
        assert re.fullmatch(r"[0-9]{3}-(ab|cd)+x", regex)
    if reason(results[2]) == "stop":
        assert json.loads(schema).keys() == {"n", "b"}
    if reason(results[3]) == "stop":
        assert re.fullmatch(r"<[a-c]{2}(,[a-c]{2})*>", lark)


def test_any_object(engine: Engine, tokenizer: Tokenizer) -> None:
    # Tokens that come close to ending it: the model would go on for ever.
    ending = dict.fromkeys(tokenizer.encode('{"}').ids, 50.0)
    (result,) = generate(engine, PROMPTS[:1], sampling(Constraint("json_object"), logit_bias=ending, temperature=0.5))
    assert text_of(tokenizer, result)[:1] == "{"
    assert reason(result) == "length" or isinstance(json.loads(text_of(tokenizer, result)), dict)


def test_the_last_token_of_a_complete_answer_is_told_to_be_text(engine: Engine, tokenizer: Tokenizer) -> None:
    (fixed,) = generate(engine, PROMPTS[:1], sampling(Constraint("regex", "abc")))
    assert fixed.finished is not None
    assert (text_of(tokenizer, fixed), reason(fixed), fixed.finished.constraint_met) == ("abc", "stop", True)
    end = engine.info.eos_token_ids[0]
    (open_ended,) = generate(engine, PROMPTS[:1], sampling(Constraint("regex", "a+"), logit_bias={end: 100.0}))
    assert open_ended.finished is not None
    assert open_ended.token_ids[-1] == end
    assert (reason(open_ended), open_ended.finished.constraint_met) == ("stop", False)


def test_no_end_before_the_form_allows_it(engine: Engine, tokenizer: Tokenizer) -> None:
    end = engine.info.eos_token_ids[0]
    (result,) = generate(engine, PROMPTS[:1], sampling(Constraint("regex", "[ab]{7}"), logit_bias={end: 100.0}))
    assert re.fullmatch("[ab]{7}", text_of(tokenizer, result))


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 50}])
def test_a_complete_answer_ends_whatever_else_was_asked(
    engine: Engine, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    (result,) = generate(engine, PROMPTS[:1], sampling(Constraint("regex", "[ab]{7}"), **options))
    assert (len(text_of(tokenizer, result)), reason(result)) == (7, "stop")


def test_the_same_tokens_alone_in_a_batch_and_after_preemption(engine: Engine, store: Path) -> None:
    how = [sampling(c, seed=i, max_tokens=80) for i, c in enumerate(CONSTRAINTS)]
    how[0] = sampling(Constraint("regex", "[a-z]{70}x"), max_tokens=80)
    how[3] = sampling(Constraint("regex", "[a-z ]{75}"), max_tokens=80)
    alone = [generate(engine, [prompt], one)[0].token_ids for prompt, one in zip(PROMPTS, how, strict=True)]
    assert [r.token_ids for r in generate(engine, PROMPTS, how)] == alone
    kv_budget = str(8 * engine.storage.block_bytes)
    with running_engine(store, threads=1, max_model_len=128, kv_budget=kv_budget) as cramped:
        assert [r.token_ids for r in generate(cramped, PROMPTS, how)] == alone
        assert cramped.core.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    "broken", [Constraint("json_schema", '{"not": {}}'), Constraint("regex", "(a"), Constraint("json_schema", "{")]
)
def test_a_constraint_that_fails_here_ends_its_own_sequence_alone(
    engine: Engine, tokenizer: Tokenizer, broken: Constraint
) -> None:
    bad, good = generate(engine, PROMPTS[:2], [sampling(broken), sampling(Constraint("regex", "abc"))])
    assert bad.finished is not None and bad.finished.error
    assert (reason(bad), bad.token_ids) == ("error", [])
    assert text_of(tokenizer, good) == "abc"


def test_choices_with_one_constraint_share_its_compilation_and_nothing_else(store: Path) -> None:
    grammars = Grammars(store / "tokenizer.json", VOCAB_SIZE, [257])
    first, second = (grammars.constrain(Constraint("regex", "[ab]{2}")) for _ in range(2))
    assert first._compiled is second._compiled
    mask = second.allowed()
    assert first.allowed() == mask
    token = next(i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1)
    first.accept(token)
    first.accept(token)
    assert first.is_finished and not second.is_finished
    assert second.allowed() == mask


@pytest.mark.parametrize(("schema", "begin", "goes_on"), [("number", "-1.", False), ("string", '"', True)])
def test_the_digits_of_a_number_come_to_an_end_and_those_of_a_string_do_not(
    store: Path, tokenizer: Tokenizer, schema: str, begin: str, goes_on: bool
) -> None:
    matcher = Grammars(store / "tokenizer.json", VOCAB_SIZE, [257]).constrain(
        Constraint("json_schema", json.dumps({"type": schema}))
    )
    (seven,) = tokenizer.encode("7").ids
    for token in tokenizer.encode(begin).ids + [seven] * DIGITS_MAX:
        assert matcher.allowed()[token // 8] >> token % 8 & 1
        matcher.accept(token)
    mask = matcher.allowed()
    assert bool(mask[seven // 8] >> seven % 8 & 1) == goes_on
    assert any(mask)


def test_no_token_left_names_the_form(engine: Engine) -> None:
    (result,) = generate(engine, PROMPTS[:1], sampling(Constraint("regex", "abc"), allowed_token_ids=[7]))
    assert result.finished is not None and result.finished.error is not None
    assert "the answer's form" in result.finished.error
    assert result.finished.refused


def test_a_token_that_was_not_allowed_ends_in_an_error(store: Path) -> None:
    matcher = Grammars(store / "tokenizer.json", VOCAB_SIZE, [257]).constrain(Constraint("regex", "abc"))
    assert any(matcher.allowed())
    matcher.accept(ord("z"))
    assert not matcher.is_finished
    with pytest.raises(ConstraintFailed, match="cannot be kept to any longer"):
        matcher.allowed()


@pytest.mark.parametrize("text", [None, "{}", '{"model": {"type": "Unheard-of"}}'])
def test_a_tokenizer_that_cannot_be_used_is_a_clear_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="answers cannot be constrained: "):
        Grammars(tmp_path / "tokenizer.json", VOCAB_SIZE, [257])
