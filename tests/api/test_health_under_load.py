"""Probes answer in time whatever the server is busy with. The server is a process of its own, as in production."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.demo import demo_store
from support.fake_engine import WAIT_S

pytestmark = pytest.mark.acceptance

TESTS = Path(__file__).parents[1]
BOUND_S = 0.1
STREAMS = 32
WINDOW = 400_000
"""So large that 5 MB of text might be a prompt, and is found not to be only once it is tokenized."""

PROGRAM = f"""
import asyncio, os, sys
from pathlib import Path
from expertd_engine.config import Config
from expertd_server import daemon
from support.fake_engine import FakeLauncher, Script, engine_info

os.environ["TOKENIZERS_PARALLELISM"] = "false"

async def steps(launcher):
    while True:
        await asyncio.sleep(0.05)
        for engine in launcher.engines:
            engine.allow(1)

async def main():
    listening = daemon.bind("127.0.0.1", 0)
    info = engine_info(max_model_len={WINDOW}, vocab_size=49152)
    launcher = FakeLauncher(Path(sys.argv[1]), Script(info=info, held=True))
    server = daemon.Daemon(Config(), listening, launcher)
    server.handle_signals()
    pace = asyncio.create_task(steps(launcher))
    print(listening.getsockname()[1], flush=True)
    return await server.run()

sys.exit(asyncio.run(main()))
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(demo_store("bf16"))], cwd=TESTS, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        base = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with httpx.Client(base_url=base, timeout=WAIT_S) as http:
            while http.get("/ready").status_code != 200:
                pass
        yield base
        process.kill()


class Readers:
    """Clients that read streams until they are told to stop."""

    def __init__(self, url: str, count: int) -> None:
        self.url = url
        self.chunks = [0] * count
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.read, args=(i,)) for i in range(count)]

    def read(self, index: int) -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 100_000, "ignore_eos": True}
        with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=WAIT_S) as response:
            for line in response.iter_lines():
                self.chunks[index] += bool(line)
                if self.over.is_set():
                    return

    def __enter__(self) -> Readers:
        for thread in self.threads:
            thread.start()
        while not all(self.chunks):
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(WAIT_S)


@pytest.mark.parametrize(("path", "status"), [("/v1/completions", 400), ("/tokenize", 200)])
def test_probes_answer_while_5_mb_are_tokenized_and_32_streams_run(url: str, path: str, status: int) -> None:
    text = ("The quick brown fox jumps over the lazy dog, twice; and then, 1969 times, it rests. " * 60_000)[
        : 5 * 10**6
    ]
    answer: list[httpx.Response] = []

    def post() -> None:
        answer.append(httpx.post(url + path, json={"prompt": text}, timeout=120))

    worst = {"/live": 0.0, "/health": 0.0}
    asked = 0
    with Readers(url, STREAMS) as readers, httpx.Client(base_url=url, timeout=WAIT_S) as http:
        before = list(readers.chunks)
        poster = threading.Thread(target=post)
        poster.start()
        while poster.is_alive():
            for probe in worst:
                began_s = time.monotonic()
                assert http.get(probe).status_code == 200
                worst[probe] = max(worst[probe], time.monotonic() - began_s)
                asked += 1
            time.sleep(0.005)
        gained = [after - then for after, then in zip(readers.chunks, before, strict=True)]
    print(f"{path}: {asked} probes, slowest {worst}; chunks for each stream meanwhile {min(gained)} to {max(gained)}")
    assert answer[0].status_code == status
    assert asked >= 10
    assert min(gained) > 0
    assert max(worst.values()) < BOUND_S
