"""A running server whose engine says things that are nearly messages: it answers, or it takes another engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Self

from expertd_server.supervisor import RestartPolicy
from fuzz.messages import TO_SERVER, frame_of
from support.running_server import Server, running

PATIENT = RestartPolicy(tries=10**9, first_delay_s=0.001, max_delay_s=0.001)
STATUSES = (200, 400, 500, 503)


class FrameTarget:
    """Frames go to the server while a request is under way; a request after it must be answered."""

    def __init__(self, server: Server) -> None:
        self._server = server
        server.on_loop(lambda: setattr(server.daemon.supervisor, "_policy", PATIENT))

    @classmethod
    @contextmanager
    def running(cls, store: Path) -> Iterator[Self]:
        with running(store) as start:
            yield cls(start())

    def try_frame(self, seed: int) -> int:
        """The status of the answer that was under way."""
        rng = Random(seed)
        server = self._server
        before = len(server.launcher.engines)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.complete, max_tokens=20, stream=rng.random() < 0.5)
            server.engine.babble(frame_of(rng.choice(TO_SERVER), rng))
            answer = asked.result()
        assert answer.status_code in STATUSES, answer.text
        server.until(lambda: server.complete(max_tokens=1).status_code == 200)
        assert len(server.launcher.engines) <= before + 1 and server.error is None
        assert server.daemon.service.admission.used == 0
        return answer.status_code
