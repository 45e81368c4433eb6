"""The sandbox that chat templates are rendered in: transformers' conventions, and bounds."""

from __future__ import annotations

from datetime import datetime

import pytest

from expertd_engine.errors import StoreError
from expertd_server import templates
from expertd_server.templates import ChatTemplate, TemplateRefused, load_templates

USER = [{"role": "user", "content": "Hi <b>&é"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(USER, variables=variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>Hi <b>&é"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>&é"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "Hi <b>&é"\n}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% if add_generation_prompt %}assistant:{% endif %}{{ tools }}{{ documents }}", "assistant:NoneNone"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ unknown is defined }}{{ enable_thinking }}", "FalseFalse"),
    ],
)
def test_templates_are_rendered_as_transformers_does(source: str, expected: str) -> None:
    assert render(source, enable_thinking=False) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{{ messages[0].content + none }}", "str"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='system') }}", "unsafe"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'file:///etc/passwd' %}", "no loader"),
    ],
)
def test_what_a_template_refuses_is_told_in_its_own_words(source: str, words: str) -> None:
    with pytest.raises(TemplateRefused, match=words) as refused:
        render(source)
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_clients_variables_do_not_replace_the_conversation() -> None:
    assert render("{{ messages[0].role }}{{ x }}", messages=[], x=1) == "user1"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].role }}{% endfor %}{% endfor %}",
    ],
)
def test_rendering_without_end_is_cut_off(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_TIMEOUT_S", 0.05)
    with pytest.raises(TemplateRefused, match=r"longer than 0\.05 seconds"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(999) %}{{ messages[0].content }}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_output_without_end_is_cut_off(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(TemplateRefused, match="more than 1000 characters"):
        render(source)


def test_what_is_not_a_template_is_a_fault_of_the_store() -> None:
    with pytest.raises(StoreError, match="chat template"):
        ChatTemplate("{% if %}")


def test_templates_come_from_the_tokenizers_settings() -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": None,
        "chat_template": [{"name": "default", "template": "{{ bos_token }}"}, {"name": "tool_use", "template": "t"}],
    }
    found = load_templates(settings)
    assert {name: template.render([]) for name, template in found.items()} == {"default": "<s>", "tool_use": "t"}
    assert list(load_templates({"chat_template": "x"})) == ["default"]
    assert load_templates({}) == {}


def test_the_variables_of_a_template_are_known() -> None:
    assert {"tools", "enable_thinking"} <= ChatTemplate("{{ tools }}{% if enable_thinking %}{% endif %}").variables
