"""The expert budget of a daemon falls and rises twice under sixteen streams: who notices, how fast memory comes back,
and how long hits take to. Long, and prints figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from expertd_engine.memory import MemoryMeter
from support.daemon import RunningDaemon, daemon
from support.demo import CACHE

STREAMS = 16
TOKENS = 48
EVERY_S = 0.1
BACK_S = 2.0
"""In which memory has to come back."""
PACE_S = 1.0
"""Over which hits are counted."""
WATCH_S = 20.0

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@dataclass(frozen=True)
class Look:
    at_s: float
    used: int
    """Bytes of all processes, from outside."""
    hits: float
    lookups: float


class Watcher:
    """Looks at the daemon from outside, again and again."""

    def __init__(self, running: RunningDaemon) -> None:
        self.looks: list[Look] = []
        self._running = running
        self._meter = MemoryMeter(running.process.pid)

    @contextmanager
    def watching(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=self._running.url, timeout=60) as http:
                while not over.wait(EVERY_S):
                    experts = http.get("/status").json()["experts"]
                    used = self._meter.measure().used_bytes
                    self.looks.append(Look(time.monotonic(), used, experts.get("hit", 0), experts["lookups"]))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def since(self, began_s: float, seconds: float = WATCH_S) -> list[Look]:
        return [look for look in self.looks if began_s <= look.at_s <= began_s + seconds]

    def regained_after(self, began_s: float, rate: float) -> float | None:
        """Seconds until hits, over `PACE_S`, are at 95 % of `rate` again."""
        looks = self.since(began_s)
        for i, look in enumerate(looks):
            earlier = [one for one in looks[:i] if one.at_s <= look.at_s - PACE_S]
            if earlier and look.lookups > earlier[-1].lookups:
                met = (look.hits - earlier[-1].hits) / (look.lookups - earlier[-1].lookups)
                if met >= 0.95 * rate:
                    return look.at_s - began_s
        return None


def stream(url: str, number: int) -> tuple[int, str]:
    body = {"prompt": f"Number {number}: once upon a time", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text


def test_a_budget_falls_and_rises_twice_under_sixteen_streams(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("admin\n")
    flags = ("--max-model-len", "512", "--admin-key-file", str(tmp_path / "key"), "--cache-dir", str(CACHE))
    with daemon("demo", *flags) as running, ThreadPoolExecutor(STREAMS) as pool:
        alone = list(pool.map(lambda i: stream(running.url, i), range(STREAMS)))
        watcher, over = Watcher(running), threading.Event()

        def again(number: int) -> list[tuple[int, str]]:
            answers = []
            while not over.is_set():
                answers.append(stream(running.url, number))
            return answers

        with watcher.watching():
            streams = [pool.submit(again, number) for number in range(STREAMS)]
            time.sleep(WATCH_S)
            rate = rate_of(watcher.looks)
            for turn in range(2):
                change(running, watcher, "30%", turn, rate)
                change(running, watcher, "100%", turn, rate)
            over.set()
            answers = [one.result() for one in streams]
        assert all(answer == alone[number] for number, each in enumerate(answers) for answer in each)
        assert all(status == 200 for status, _ in alone)
        print(f"{sum(map(len, answers))} answers, all as alone")


def rate_of(looks: list[Look]) -> float:
    return (looks[-1].hits - looks[0].hits) / (looks[-1].lookups - looks[0].lookups)


def change(running: RunningDaemon, watcher: Watcher, share: str, turn: int, rate: float) -> None:
    """Set the budget, and look on for a while."""
    before = running.http.get("/status").json()["memory"]["experts"]
    used = watcher.looks[-1].used
    began_s = time.monotonic()
    answer = running.http.put("/admin/budget", json={"expert_budget": share}, headers={"authorization": "Bearer admin"})
    assert answer.status_code == 200, answer.text
    now = answer.json()["expert_limit_bytes"]
    time.sleep(WATCH_S)
    looks = watcher.since(began_s)
    asked = before["resident"] - now
    if asked > 0:
        back = [look.at_s - began_s for look in looks if used - look.used >= 0.95 * asked]
        assert back and back[0] <= BACK_S, f"{asked} bytes were not back in {BACK_S} s"
        assert max(look.used for look in looks if look.at_s > began_s + BACK_S) <= used
        print(f"\n{turn}: {share}: {asked} bytes back in {back[0]:.2f} s; hits {rate_of(looks[len(looks) // 2 :]):.1%}")
    else:
        print(f"{turn}: {share}: 95 % of hits ({rate:.1%} before) after {watcher.regained_after(began_s, rate)} s")
