"""The contract of virtual mode: who asks for it, what is promised, what is told."""

from __future__ import annotations

from typing import Any

import pytest

from support.running_server import Server, Start

CASES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, float]]] = [
    ({}, {}, ("exact", 1.0)),
    ({}, {"expert_mode": "virtual"}, ("virtual", 1.0)),
    ({}, {"expert_mode": "virtual", "max_substituted_mass": 0.25}, ("virtual", 0.25)),
    ({}, {"expert_mode": "virtual", "max_substituted_mass": 0}, ("exact", 1.0)),
    ({"expert_mode": "virtual", "max_substituted_mass": 0.5}, {}, ("virtual", 0.5)),
    ({"expert_mode": "virtual", "max_substituted_mass": 0.5}, {"max_substituted_mass": 0.75}, ("virtual", 0.75)),
    ({"expert_mode": "virtual", "max_substituted_mass": 0.5}, {"expert_mode": "exact"}, ("exact", 0.5)),
]
"""The server's configuration, the request, and what the engine is told."""


@pytest.mark.parametrize(("config", "request_", "told"), CASES, ids=str)
def test_the_request_decides_and_the_server_where_it_does_not(
    start: Start, config: dict[str, Any], request_: dict[str, Any], told: tuple[str, float]
) -> None:
    server = start(**config)
    for ask in (server.complete, server.chat):
        assert ask(**request_).status_code == 200
        sent = list(server.engine.submitted.values())[-1]
        assert (sent.mode, sent.max_substituted_mass) == told


def test_a_limit_without_virtual_mode_is_refused(server: Server) -> None:
    answer = server.complete(expert_mode="exact", max_substituted_mass=0.5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_substituted_mass")
    assert server.complete(expert_mode="exact", max_substituted_mass=0).status_code == 200


def test_usage_says_what_was_substituted(server: Server) -> None:
    server.script.answer = b"abc"
    usage = server.complete(expert_mode="virtual", include_expert_usage=True, n=2).json()["usage"]["expert"]
    assert (usage["substitutions"], usage["substituted_share"], usage["substituted_mass"]) == (4, 0.25, 0.25)
    exact = server.complete(include_expert_usage=True).json()["usage"]["expert"]
    assert (exact["substitutions"], exact["substituted_share"], exact["substituted_mass"]) == (0, 0.0, 0.0)
