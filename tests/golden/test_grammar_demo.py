"""Random JSON schemas: an answer that stops validates, and one that is cut off can still be completed to one that does.

By default a few schemas on a tiny model, whose random words seldom come to an end; `make acceptance` runs two hundred
on the demo and prints how many came to theirs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from expertd_engine.grammar import Grammars, Matcher
from expertd_engine.messages import Constraint, Sampling
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from support.demo import demo_store
from support.engine import generate, running_engine
from support.tiny_checkpoints import make_checkpoint

MAX_TOKENS = 512
BATCH = 25
MAX_COMPLETION = 4000
"""Tokens after which an answer that was cut off counts as impossible to complete."""

_WORDS = ["red", "name", "size", "City", "items", "über", "is_ok", "x", "zip code", 'quo"te', "a/b", "日本"]


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of all the keywords that constrain an answer here, deeper ones simpler."""
    makers = [_string, _number, _choice, _flag]
    if depth < 3:
        makers += [_object, _array, _any_of]
    return (_object if depth == 0 else chance.choice(makers))(chance, depth)


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(_WORDS, chance.randint(1, 4))
    properties = {name: random_schema(chance, depth + 1) for name in names}
    required = names if chance.random() < 0.7 else names[:1]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    return {
        "type": "array", "items": random_schema(chance, depth + 1), "minItems": least,
        "maxItems": least + chance.randint(0, 2),
    }  # fmt: skip


def _any_of(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(chance, depth + 1) for _ in range(2)]}


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    limits: list[dict[str, Any]] = [
        {},
        {"minLength": 2, "maxLength": chance.randint(2, 30)},
        {"pattern": chance.choice(["^[A-Z][a-z]{1,8}$", r"^\d{3}-\d{2}$", "^(yes|no|maybe)( .{1,9})?$"])},
        {"format": chance.choice(["date", "time", "uuid", "ipv4"])},
    ]
    return {"type": "string", **chance.choice(limits)}


def _number(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(-1000, 1000)
    limits: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 7},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10**6},
        {"type": "number", "minimum": low / 8, "maximum": abs(low) + 0.5},
        {"type": "number", "minimum": low},
    ]
    return chance.choice(limits)


def _choice(chance: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [*chance.sample(_WORDS, 3), chance.randint(-5, 5), None]
    return {"enum": values} if chance.random() < 0.7 else {"const": chance.choice(values)}


def _flag(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"type": chance.choice(["boolean", "null"])}


def complete(matcher: Matcher, tokenizer: Tokenizer, end: int, told: list[int]) -> list[int]:
    """`told` and what ends the answer soonest, by taking what closes something wherever it may come."""
    closing = [token for text in ('"', "}", "]") if (token := tokenizer.token_to_id(text)) is not None]
    chance = random.Random(0)
    tokens = list(told)
    for token in told:
        matcher.accept(token)
    for _ in range(MAX_COMPLETION):
        if matcher.is_finished:
            return tokens
        mask = int.from_bytes(matcher.allowed(), "little")
        if mask >> end & 1:
            return tokens
        tokens.append(next((token for token in closing if mask >> token & 1), None) or chance.choice(_ones(mask)))
        matcher.accept(tokens[-1])
    raise AssertionError(f"no end to {tokenizer.decode(told)!r}")


def _ones(mask: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def validate(schema: dict[str, Any], text: str) -> None:
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))


def run(engine: Engine, store: Path, schemas: list[dict[str, Any]], prompt_of: Any, **options: Any) -> int:
    """How many answers stopped. Every answer is checked."""
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    grammars = Grammars(store / "tokenizer.json", engine.info.vocab_size, engine.info.eos_token_ids)
    constraints = [Constraint("json_schema", json.dumps(schema)) for schema in schemas]
    sampling = [Sampling(seed=i, constraint=c, **options) for i, c in enumerate(constraints)]
    prompts = [tokenizer.encode(prompt_of(schema)).ids for schema in schemas]
    stopped = 0
    for first in range(0, len(schemas), BATCH):
        part = slice(first, first + BATCH)
        results = generate(engine, prompts[part], sampling[part])
        for schema, constraint, result in zip(schemas[part], constraints[part], results, strict=True):
            assert result.finished is not None and result.finished.error is None, (schema, result.finished)
            if result.finished.reason == "stop":
                stopped += 1
                validate(schema, tokenizer.decode(result.token_ids))
            else:
                whole = complete(
                    grammars.constrain(constraint), tokenizer, engine.info.eos_token_ids[0], result.token_ids
                )
                validate(schema, tokenizer.decode(whole))
    return stopped


def test_random_schemas_on_a_tiny_model(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path / "checkpoint", seed=1)
    prepare(tmp_path / "checkpoint", store := tmp_path / "store", "float32")
    chance = random.Random(1)
    schemas = [random_schema(chance) for _ in range(40)]
    with running_engine(store, threads=1, max_model_len=128) as engine:
        stopped = run(engine, store, schemas, lambda schema: "{}", max_tokens=120, temperature=1.0)
    assert 0 < stopped < len(schemas)


@pytest.mark.acceptance
def test_two_hundred_random_schemas_on_the_demo() -> None:
    store = demo_store("bf16")
    chance = random.Random(2)
    schemas = [random_schema(chance) for _ in range(200)]
    with running_engine(store, max_model_len=2048) as engine:
        stopped = run(engine, store, schemas, prompt_for, max_tokens=MAX_TOKENS, temperature=0.7)
    print(f"{stopped} of {len(schemas)} answers stopped within {MAX_TOKENS} tokens")
    assert stopped >= 0.95 * len(schemas)


def prompt_for(schema: dict[str, Any]) -> str:
    text = json.dumps(schema, ensure_ascii=False)
    return f"<|im_start|>user\nAnswer in JSON that fits this schema: {text}<|im_end|>\n<|im_start|>assistant\n"
