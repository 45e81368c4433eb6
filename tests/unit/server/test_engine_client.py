from __future__ import annotations

import asyncio

import pytest

from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_server.engine_client import EngineClient, Handlers, Patience
from expertd_server.errors import EngineDead


def _ignore(_: object) -> None:
    pass


def test_what_could_not_be_sent_does_not_live() -> None:
    async def submit_without_engine() -> int:
        client = EngineClient(Handlers(_ignore, _ignore, _ignore, _ignore, _ignore, _ignore))
        sequence = Submit(sequence_id=1, inputs=[TextInput([1])], sampling=Sampling(max_tokens=1))
        with pytest.raises(EngineDead, match="no engine"), client.submit([sequence], Patience(60.0, _ignore)):
            pytest.fail("nothing was submitted")
        return client.live_sequences

    assert asyncio.run(submit_without_engine()) == 0
