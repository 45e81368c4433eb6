"""`python -m fuzz.http_server`: a server with a fake engine, for schema-driven fuzzing; prints its address, serves
until its standard input ends."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from expertd_server.auth import KeyRing
from fuzz.frames import PATIENT
from support import chat_templates
from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import write_store
from support.running_server import running

ADMIN_KEY = "fuzz"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), chat_template=chat_templates.THINKING)
        with running(store) as start:
            script = Script(answer=b'{"a": 1} and so on', info=engine_info(max_model_len=4096))
            server = start(script, keys=KeyRing.of(admin=[ADMIN_KEY]), max_sequences=1024, max_waiting=2**20)
            server.on_loop(lambda: setattr(server.daemon.supervisor, "_policy", PATIENT))
            print(server.url, flush=True)
            sys.stdin.read()
            metrics = server.metrics()
    restarts = sum(value for name, value in metrics.items() if name.startswith("expertd_engine_restarts_total"))
    assert restarts == 0, f"{restarts} engines were restarted"


if __name__ == "__main__":
    main()
