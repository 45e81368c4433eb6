"""Finding calls in a model's text, in each form and however the text is cut; and the schema of a call that must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_server.chat_schemas import Tool
from expertd_server.errors import InvalidRequest
from expertd_server.tool_calls import SYNTAXES, CallPiece, Text, ToolParser, ToolReader, detect
from expertd_server.tool_choice import tools_to_use

ONE = '{"name": "add", "arguments": {"a": 1, "s": "}\\"{"}}'
TWO = '{"name": "now", "arguments": {}}'
ARGUMENTS = '{"a": 1, "s": "}\\"{"}'


def read(parser: ToolParser, pieces: list[str], *, single: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls; checks that each call begins once and that indexes run."""
    reader = ToolReader(SYNTAXES[parser], {"add", "now"}, single=single)
    found = [out for piece in pieces for out in reader.feed(piece)] + reader.end()
    calls: list[tuple[str, str]] = []
    for piece in found:
        if isinstance(piece, CallPiece):
            if piece.id is not None:
                assert piece.index == len(calls)
                calls.append((piece.name or "", ""))
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert reader.called == bool(calls)
    return "".join(piece.text for piece in found if isinstance(piece, Text)), calls


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", ("", [("add", ARGUMENTS)])),
        ("hermes", f"Let me.\n\n<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>\n",
         ("Let me.", [("add", ARGUMENTS), ("now", "{}")])),
        ("hermes", "no call, <b> and <tool", ("no call, <b> and <tool", [])),
        ("hermes", "<tool_call>not json</tool_call>", ("<tool_call>not json</tool_call>", [])),
        ("hermes", '<tool_call>{"nome": 1}</tool_call>', ('<tool_call>{"nome": 1}</tool_call>', [])),
        ("hermes", '<tool_call>{"arguments": {"a": 2}, "name": "other"}</tool_call>', ("", [("other", '{"a": 2}')])),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}', ("", [("add", '{"a": 2}')])),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', ("", [("add", '{"a": 1')])),
        ("hermes", '<tool_call>{"name": "ad', ('<tool_call>{"name": "ad', [])),
        ("hermes", f"{ONE}", (ONE, [])),
        ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]", ("", [("add", ARGUMENTS), ("now", "{}")])),
        ("mistral", f"Sure.[TOOL_CALLS]add[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
         ("Sure.", [("add", ARGUMENTS), ("now", "{}")])),
        ("mistral", "[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{}", ("", [("add", "{}")])),
        ("mistral", "see [1] and [TOOL", ("see [1] and [TOOL", [])),
        ("json", ONE, ("", [("add", ARGUMENTS)])),
        ("json", '{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
        ("json", f" [{ONE}, {TWO}]", ("", [("add", ARGUMENTS), ("now", "{}")])),
        ("json", f"{ONE}; {TWO}", ("", [("add", ARGUMENTS), ("now", "{}")])),
        ("json", '{"name": "Ada", "arguments": {}}', ('{"name": "Ada", "arguments": {}}', [])),
        ("json", '{"city": "Paris"} is it', ('{"city": "Paris"} is it', [])),
        ("json", "[1, 2]", ("[1, 2]", [])),
        ("json", "The answer: {}  ", ("The answer: {}  ", [])),
        ("json", "", ("", [])),
    ],
)  # fmt: skip
def test_calls_are_found_in_every_form(parser: ToolParser, text: str, expected: Any) -> None:
    assert read(parser, [text]) == expected
    assert read(parser, list(text)) == expected


@given(
    st.sampled_from(["hermes", "mistral", "json"]),
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "add[ARGS]", ONE, TWO, '{"a"', "}", "x", " ", "[", "\n"]
        )
    ),
    st.lists(st.integers(1, 9), min_size=1),
)  # fmt: skip
def test_how_a_text_is_cut_does_not_matter(parser: ToolParser, parts: list[str], sizes: list[int]) -> None:
    text = "".join(parts)
    pieces: list[str] = []
    while text:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[:size])
        text = text[size:]
    assert read(parser, pieces) == read(parser, ["".join(parts)])


def test_only_the_first_call_is_told_where_one_is_wanted() -> None:
    text = f"<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call> more"
    assert read("hermes", [text], single=True) == ("", [("add", ARGUMENTS)])


def test_mistral_gets_ids_of_its_own_length() -> None:
    pieces = ToolReader(SYNTAXES["mistral"], {"add"}).feed(f"[TOOL_CALLS][{ONE}]")
    ids = [piece.id for piece in pieces if isinstance(piece, CallPiece) and piece.id is not None]
    assert [len(i) for i in ids] == [9]
    assert ids[0].isalnum()


@pytest.mark.parametrize(
    ("template", "takes_tools", "parser"),
    [
        ("<tool_call>\n{{ t }}</tool_call>", True, "hermes"),
        ("[TOOL_CALLS]", True, "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary}', True, "json"),
        ("{{ messages }}", False, "json"),
        ("<tool_call><function=x>", True, None),
        ("<｜tool▁calls▁begin｜>", True, None),
    ],
)
def test_the_form_is_the_one_that_the_template_teaches(template: str, takes_tools: bool, parser: str | None) -> None:
    assert detect(template, takes_tools) == parser


def tool(name: str, parameters: dict[str, Any] | None = None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_a_forced_call_is_held_to_the_tools_schema() -> None:
    schema = {
        "type": "object", "properties": {"at": {"$ref": "#/$defs/Point"}}, "$schema": "x",
        "$defs": {"Point": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Point"}}}},
    }  # fmt: skip
    use = tools_to_use([tool("go", schema), tool("stop")], "required")
    assert use is not None
    assert json.loads(use.constraint().text) == {
        "anyOf": [
            {"type": "object", "required": ["name", "arguments"], "additionalProperties": False,
             "properties": {"name": {"const": "go"}, "arguments": {
                 "type": "object", "properties": {"at": {"$ref": "#/$defs/0.Point"}}}}},
            {"type": "object", "required": ["name", "arguments"], "additionalProperties": False,
             "properties": {"name": {"const": "stop"}, "arguments": {"type": "object", "properties": {}}}},
        ],
        "$defs": {"0.Point": {"type": "object", "properties": {"next": {"$ref": "#/$defs/0.Point"}}}},
    }  # fmt: skip


NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("choice", "names", "forced"),
    [
        (None, {"add", "now"}, False), ("auto", {"add", "now"}, False), ("required", {"add", "now"}, True),
        (NAMED, {"now"}, True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, {"now"}, False),
    ],
)  # fmt: skip
def test_a_choice_says_which_tools_there_are_and_whether_one_must_be(
    choice: object, names: set[str], forced: bool
) -> None:
    use = tools_to_use([tool("add"), tool("now")], choice)
    assert use is not None
    assert use.names == names
    assert use.forced == forced


@pytest.mark.parametrize(
    "choice",
    ["any", 1, {}, {"type": "function"}, {"type": "function", "function": {"name": "gone"}},
     {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}],
)  # fmt: skip
def test_a_choice_that_means_nothing_is_refused(choice: object) -> None:
    with pytest.raises(InvalidRequest, match="tool_choice"):
        tools_to_use([tool("add")], choice)


def test_without_tools_there_is_nothing_to_choose() -> None:
    assert tools_to_use(None, "none") is None
    with pytest.raises(InvalidRequest, match="only with tools"):
        tools_to_use(None, "auto")
