"""Our rendering of chat templates against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from expertd_server.templates import ChatTemplate
from support import chat_templates
from support.demo import demo_store

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"a": [1, None]}}}
]

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b> & é"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": " a\n\n"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "x", "name": "ann"}, {"role": "user", "content": ""}],
]

TRICKY = """{{ bos_token }}
    {%- set ns = namespace(first=true) %}
  {% for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {# a comment #}
    {% if ns.first %}{% set ns.first = false %}first:{% endif %}
    {% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}
{{ m.content | trim }}|{{ m['name'] | default('nobody') }}
  {% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}

"""


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(3))
@pytest.mark.parametrize(
    "source", [TRICKY, chat_templates.CHATML, chat_templates.HERMES], ids=["tricky", "chatml", "hermes"]
)
@pytest.mark.parametrize("generate", [False, True])
def test_templates_come_out_as_under_transformers(source: str, messages: list[dict[str, Any]], generate: bool) -> None:
    ours, theirs = rendered(source, messages, TOOLS, generate, enable_thinking=False)
    assert ours == theirs


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(3))
def test_the_demos_template_comes_out_as_under_transformers(messages: list[dict[str, Any]]) -> None:
    source = (demo_store("bf16") / "chat_template.jinja").read_text(encoding="utf-8")
    ours, theirs = rendered(source, messages, None, True)
    assert ours == theirs


def rendered(
    source: str, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool, **more: Any
) -> tuple[str, str]:
    """By us and by transformers."""
    (theirs,), _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=generate, bos_token="<s>", **more
    )
    ours = ChatTemplate(source, {"bos_token": "<s>"})
    return ours.render(messages, tools=tools, add_generation_prompt=generate, variables=more), theirs
