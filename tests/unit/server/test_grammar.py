from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from expertd_engine import grammar_check
from expertd_engine.messages import Constraint, ConstraintKind
from expertd_server import grammar
from expertd_server.errors import InvalidRequest, Unavailable
from expertd_server.grammar import MAX_TEXT_BYTES, MAX_WAITING, GrammarChecker

SLOW = Constraint("regex", "a?" * 9000 + "a" * 9000)
"""A second of work for the library, as far as memory lasts, and many more as it gets longer."""
CRASHING = Constraint("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3500)) + 'r3500: "a"')
"""A chain of rules that exhausts the library's stack."""


def schema(**keywords: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(keywords))


def refusal(constraint: Constraint, checker: GrammarChecker | None = None) -> str:
    """The message of the refusal, "" if there is none."""
    try:
        asyncio.run((checker or GrammarChecker()).check(constraint, param="response_format"))
    except InvalidRequest as error:
        assert (error.status, error.param) == (400, "response_format")
        assert error.message.startswith("response_format: ")
        return error.message
    return ""


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_object"),
        schema(
            type="object", properties={"a": {"$ref": "#/$defs/b"}}, required=["a"], **{"$defs": {"b": {"enum": [1]}}}
        ),
        schema(description="anything"),
        schema(type="integer", exclusiveMinimum=3),
        schema(properties={"exclusiveMinimum": {"const": {"exclusiveMaximum": 1}}}),
        Constraint("regex", r"\d{4}-\d\d"),
        Constraint("choice", json.dumps(["yes", "no", 'a "quoted"\nline'])),
        Constraint("lark", 'start: "a" | start "b"'),
    ],
    ids=lambda constraint: constraint.kind,
)
def test_sound_constraints_pass(constraint: Constraint) -> None:
    assert refusal(constraint) == ""


@pytest.mark.parametrize(
    ("constraint", "names"),
    [
        (schema(type="string", **{"not": {"const": "a"}}), "not"),
        (schema(type="array", uniqueItems=True), "uniqueItems"),
        (schema(**{"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (schema(properties={"a": {"type": "number", "exclusiveMinimum": 4}}), "exclusiveMinimum"),
        (schema(anyOf=[{"enum": [1]}, {"exclusiveMaximum": 4}]), "exclusiveMaximum"),
        (schema(type="strin"), "strin"),
        (schema(type="string", format="postcode"), "postcode"),
        (schema(**{"$ref": "http://example.org/schema"}), "http://example.org/schema"),
        (schema(type="string", minLength=3, maxLength=1), "Unsatisfiable"),
    ],
    ids=[
        "not",
        "uniqueItems",
        "options-of-its-own",
        "exclusive",
        "exclusive-deep",
        "type",
        "format",
        "ref",
        "unsatisfiable",
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_naming_what_it_is(constraint: Constraint, names: str) -> None:
    assert names in refusal(constraint)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "json_schema: EOF"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "", "nothing but the empty answer"),
        ("choice", "[]", "nothing but the empty answer"),
        ("lark", "start: foo", "unknown name"),
        ("lark", "start: " + "(" * 20000, "too deeply nested"),
        ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "recursion limit"),
        ("json_schema", '{"$ref": "#"}', "nothing but itself"),
    ],
    ids=["json", "regex", "backreference", "empty-regex", "empty-choice", "lark", "deep-lark", "deep-schema", "itself"],
)
def test_a_grammar_that_is_none_is_refused_saying_why(kind: ConstraintKind, text: str, reason: str) -> None:
    assert reason in refusal(Constraint(kind, text))


def test_a_grammar_too_large_for_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(1500)}
    monkeypatch.setattr(grammar_check, "COMPILE_LIMIT_S", 60.0)  # which a slow processor reaches before
    assert "too large" in str(grammar_check.fault_of(schema(type="object", properties=properties)))


def test_text_beyond_the_limit_is_refused_unread() -> None:
    assert f"at most {MAX_TEXT_BYTES}" in refusal(Constraint("regex", "é" * (MAX_TEXT_BYTES // 2 + 1)))


@pytest.mark.parametrize(("limit", "what"), [("COMPILE_LIMIT_S", "compiling it"), ("MASK_LIMIT_S", "a token")])
def test_what_takes_too_much_processor_time_is_at_fault(limit: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert grammar_check.fault_of(Constraint("regex", "abc")) is None
    monkeypatch.setattr(grammar_check, limit, 0.0)
    assert str(grammar_check.fault_of(Constraint("regex", "abc"))).startswith(f"{what} takes ")


def test_what_takes_too_long_is_given_up_and_the_next_is_checked() -> None:
    checker = GrammarChecker(limit_s=0.01)
    assert "takes longer than 0.01 s" in refusal(SLOW, checker)
    assert refusal(Constraint("json_object")) == ""


@pytest.mark.parametrize("constraint", [CRASHING, SLOW], ids=["stack", "memory"])
def test_what_crashes_the_library_is_refused(constraint: Constraint) -> None:
    assert "nested too deeply or too large" in refusal(constraint)


def test_a_long_fault_is_cut() -> None:
    assert len(refusal(Constraint("regex", "(" + "a" * 10000))) < 300


def test_the_event_loop_goes_on_meanwhile() -> None:
    async def ticks_during_check() -> int:
        check = asyncio.create_task(GrammarChecker().check(SLOW, param="response_format"))
        ticks = 0
        while not check.done():
            await asyncio.wait([check], timeout=0.001)
            ticks += 1
        assert isinstance(check.exception(), InvalidRequest)
        return ticks

    assert asyncio.run(ticks_during_check()) > 20


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def three_checks() -> None:
        checker = GrammarChecker()
        await checker.check(Constraint("json_object"), param="a")
        with pytest.raises(InvalidRequest):
            await checker.check(Constraint("regex", "(a"), param="a")
        monkeypatch.setattr(grammar, "_WORKER", ("/bin/false",))
        await checker.check(Constraint("json_object"), param="a")
        with pytest.raises(InvalidRequest, match=r"b: .*unclosed group"):
            await checker.check(Constraint("regex", "(a"), param="b")
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            await checker.check(Constraint("regex", "a"), param="a")

    asyncio.run(three_checks())


def test_a_check_that_nobody_waits_for_any_more_leaves_no_process() -> None:
    async def cancelled() -> None:
        checker = GrammarChecker()
        for _ in range(3):  # more than may run at once: their places are given back
            check = asyncio.create_task(checker.check(SLOW, param="a"))
            await asyncio.wait([check], timeout=0.05)
            check.cancel()
            with pytest.raises(asyncio.CancelledError):
                await check
        await checker.check(Constraint("json_object"), param="a")

    asyncio.run(cancelled())


def _waiting(checker: GrammarChecker, *texts: str) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(checker.check(Constraint("regex", text), param="a")) for text in texts]


def test_the_line_is_bounded_and_moves_on_when_those_in_it_leave() -> None:
    async def crowd() -> None:
        checker = GrammarChecker()
        line = _waiting(checker, *(f"a{i}" for i in range(1 + MAX_WAITING)))
        one_more, again = _waiting(checker, "b", "a3")
        with pytest.raises(Unavailable) as refused:
            await one_more
        assert (refused.value.status, refused.value.code) == (503, "server_is_overloaded")
        assert int(refused.value.headers["retry-after"]) > 0
        for task in line[:-1]:
            task.cancel()
        await asyncio.gather(*line, return_exceptions=True)
        assert [task.cancelled() for task in line] == [True] * MAX_WAITING + [False], "the last one was checked"
        await again  # although the one that brought the grammar first has left
        await checker.check(Constraint("regex", "b"), param="a")

    asyncio.run(crowd())


def test_requests_with_one_grammar_share_its_place_in_the_line() -> None:
    async def crowd() -> None:
        await asyncio.gather(*_waiting(GrammarChecker(), *["a"] * (MAX_WAITING * 3)))
        bad = await asyncio.gather(*_waiting(GrammarChecker(), *["(a"] * (MAX_WAITING * 3)), return_exceptions=True)
        assert {type(error) for error in bad} == {InvalidRequest}

    asyncio.run(crowd())
