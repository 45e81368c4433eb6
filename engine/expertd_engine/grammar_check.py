"""A process that compiles one constraint and says what is wrong with it: `Constraint` in, text or null out, as JSON."""

from __future__ import annotations

import random
import resource
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from expertd_engine.grammar import MASK_LIMIT_S, match
from expertd_engine.messages import Constraint
from expertd_engine.request import ConstraintFailed

MEMORY_LIMIT_BYTES = 64 * 2**20
"""Of data; 16 MiB are taken at the start. It must fit beside server and engine, and again into the engine."""
CPU_LIMIT_S = 5
"""Ends a worker that nobody is left to kill."""
COMPILE_LIMIT_S = 0.25
"""Processor time for compiling: the engine will spend it again for each sequence."""
WALK_BYTES = 64
STACK_BYTES = 2 * 2**20
"""Less than the engine's threads have: what does not overflow here does not overflow there."""

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")
_UNIMPLEMENTED = "Unimplemented keys: "


class ByteTokenizer(TokenizerWrapper):
    """Each byte a token, and an end: enough to tell whether a grammar compiles and lets anything come."""

    def __init__(self) -> None:
        self.eos_token_id = 256
        self.bos_token_id = None
        self.tokens: Sequence[bytes] = [bytes([byte]) for byte in range(256)] + [b"<end>"]
        self.special_token_ids = [256]
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def fault_of(constraint: Constraint) -> str | None:
    """What is wrong with the constraint, in words for the client; None if nothing is."""
    if constraint.kind == "json_schema" and (keyword := _inexact_keyword(constraint.text)) is not None:
        return f"unsupported in a JSON schema: {keyword}, unless with type integer"
    tokenizer = LLTokenizer(cast(Any, ByteTokenizer()), slices=[])
    began = time.process_time()
    try:
        matcher = match(tokenizer, constraint)
    except ConstraintFailed as failure:
        return _in_words(str(failure))
    spent = time.process_time() - began
    if spent > COMPILE_LIMIT_S:
        return f"compiling it takes {spent:.2f} s of processor time; at most {COMPILE_LIMIT_S} s are allowed"
    return _fault_of_walk(matcher)


def _inexact_keyword(text: str) -> str | None:
    """A keyword that the library takes but does not keep to: its numbers above 4 include 4.0."""
    try:
        schemas = [msgspec.json.decode(text)]
    except (ValueError, RecursionError):
        return None  # no schema at all, as the library will say
    while schemas:
        schema = schemas.pop()
        if isinstance(schema, list):
            schemas += schema
        elif isinstance(schema, dict):
            for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
                if keyword in schema and schema.get("type") != "integer":
                    return keyword
            for keyword, value in schema.items():
                if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
                    schemas += value.values()
                elif keyword not in _VALUES:
                    schemas.append(value)
    return None


def _fault_of_walk(matcher: LLMatcher) -> str | None:
    """Begin some answer, at random but always the same: what no answer survives shows here, not in the engine."""
    chance = random.Random(0)
    for length in range(WALK_BYTES):
        began = time.process_time()
        mask = matcher.compute_bitmask()
        spent = time.process_time() - began
        if spent > MASK_LIMIT_S:
            return f"a token takes {spent:.2f} s of processor time; at most {MASK_LIMIT_S} s are allowed"
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if matcher.is_error():
            if length == 0:
                return "no answer can begin: it refers to nothing but itself, or is too large"
            return f"too large: an answer fails after {length} bytes"
        if not allowed:
            return None if length else "nothing but the empty answer can meet it, or nothing at all"
        matcher.consume_token(chance.choice(allowed))
    return None


def _in_words(fault: str) -> str:
    if fault.startswith(_UNIMPLEMENTED):
        keywords = msgspec.json.decode(fault.removeprefix(_UNIMPLEMENTED), type=list[str])
        return f"unsupported in a JSON schema: {', '.join(keywords)}"
    return " ".join(fault.split())


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_answer)
    thread.start()
    thread.join()


def _answer() -> None:
    constraint = msgspec.json.decode(sys.stdin.buffer.read(), type=Constraint)
    sys.stdout.buffer.write(msgspec.json.encode(fault_of(constraint)))


if __name__ == "__main__":
    main()
