"""`make soak`: half an hour of mixed load inside a memory cgroup of exactly the budget, with budget changes, clients
that leave and engines that are killed. Nothing may be lost, nothing may grow, no answer may change.

    PYTHONPATH=tests python -m faults.soak [--minutes 30] [--model demo] [--memory-budget 720MiB]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from expertd_engine.config import parse_size
from faults.clients import Outcome, ask
from support.daemon import RunningDaemon, daemon
from support.memory_cgroup import MemoryCgroup, can_limit_memory, limited_memory, num_kills

CLIENTS = 12
ROOM = 8
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):\n", "Water boils at", "A dog is " * 20)
KILL_EVERY_S = 90.0
"""An engine that served for a minute counts as well: the server starts another one however often that happens."""
BUDGET_EVERY_S = 7.0
SAMPLE_EVERY_S = 5.0
REST_S = 30.0
"""Until everything that clients left behind has ended."""
GROWTH_ALLOWED = 1.05
"""Of memory, from the first third of the samples to the last, medians; and of descriptors."""


@dataclass
class Soak:
    """What happened. `problems` are what must not have."""

    running: RunningDaemon
    end_s: float
    admin_key: str
    group: MemoryCgroup | None
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Greedy answers by prompt: the first one given stands."""
    samples: list[tuple[int, int]] = field(default_factory=list)
    """Resident bytes of server and engine, and their descriptors."""
    budgets: Counter[int] = field(default_factory=Counter)
    """Answers to budget changes, by status."""
    killed_s: list[float] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.running.url.rpartition(":")[2])

    def over(self) -> bool:
        return time.monotonic() >= self.end_s

    async def run(self) -> None:
        tasks = [self._client(number) for number in range(CLIENTS)]
        await asyncio.gather(*tasks, self._change_budgets(), self._kill_engines(), self._sample())

    # ------------------------------------------------------------ load

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        while not self.over():
            prompt = rng.choice(PROMPTS)
            greedy = rng.random() < 0.7
            body = {
                "prompt": prompt if greedy else prompt + str(rng.random()), "ignore_eos": True,
                "temperature": 0 if greedy else 1, "stream": rng.random() < 0.6,
                "max_tokens": 16 if greedy else rng.randrange(1, 64),
            }  # fmt: skip
            leave_after = rng.randrange(1, 16) if rng.random() < 0.2 else None
            asked_s = time.monotonic()
            outcome = await ask(self.port, body, leave_after=leave_after)
            self._judge(outcome, prompt if greedy else None, asked_s)
            if outcome.kind != "answered":
                await asyncio.sleep(rng.random())

    def _judge(self, outcome: Outcome, prompt: str | None, asked_s: float) -> None:
        self.kinds[outcome.kind] += 1
        died = any(asked_s <= killed_s for killed_s in self.killed_s[-1:])
        excused = outcome.kind == "failed" and outcome.detail == "engine_dead" and died
        if outcome.kind in ("failed", "broken") and not excused:
            self.problems.append(f"lost: {outcome}")
        if prompt is not None and outcome.kind == "answered":
            expected = self.texts.setdefault(prompt, outcome.text)
            if outcome.text != expected:
                self.problems.append(f"{prompt!r} was {expected!r} and is {outcome.text!r}")

    # ------------------------------------------------------------ disturbances

    async def _change_budgets(self) -> None:
        rng = random.Random(99)
        while not self.over():
            await asyncio.sleep(min(BUDGET_EVERY_S, max(0.0, self.end_s - time.monotonic())))
            share = rng.choice(("5%", "20%", "50%", "100%", "1%"))
            status = await asyncio.to_thread(put_budget, self.running.url, share, self.admin_key)
            self.budgets[status] += 1
            if status not in (200, 400, 503):
                self.problems.append(f"a budget of {share} was answered with {status}")

    async def _kill_engines(self) -> None:
        while time.monotonic() + 1.5 * KILL_EVERY_S < self.end_s:
            await asyncio.sleep(KILL_EVERY_S)
            self.killed_s.append(time.monotonic())
            os.kill(self.running.engine_pid(), signal.SIGKILL)

    async def _sample(self) -> None:
        while not self.over():
            await asyncio.sleep(SAMPLE_EVERY_S)
            pids = [self.running.process.pid]
            try:
                pids.append(self.running.engine_pid())
                self.samples.append((sum(map(resident_bytes, pids)), sum(map(descriptors, pids))))
            except (IndexError, OSError):  # between two engines
                continue

    # ------------------------------------------------------------ the end

    def check_rest(self) -> None:
        """All is quiet: what is counted is what is there."""
        metrics = self.running.fresh_metrics()
        patient_s = time.monotonic() + REST_S
        while metrics["expertd_requests_running"] and time.monotonic() < patient_s:  # the last who left
            metrics = self.running.fresh_metrics()
        for name in ("expertd_requests_running", "expertd_requests_waiting", "expertd_kv_cache_used_bytes"):
            if metrics[name]:
                self.problems.append(f"at rest {name} is {metrics[name]}")
        if metrics["expertd_engine_restarts_total"] != len(self.killed_s):
            self.problems.append(f"{metrics['expertd_engine_restarts_total']} restarts, {len(self.killed_s)} kills")
        third = len(self.samples) // 3
        for what, values in zip(("memory", "descriptors"), zip(*self.samples, strict=True), strict=True):
            first, last = median(values[:third] or values), median(values[-third:] or values)
            if last > GROWTH_ALLOWED * first:
                self.problems.append(f"{what} grew from {first} to {last}")
        if self.group is not None and num_kills(self.group):
            self.problems.append(f"the kernel killed {num_kills(self.group)} processes")

    def report(self) -> str:
        memory, files = zip(*self.samples, strict=True)
        charged = f", peak charged {self.group.peak_bytes()}, kills {num_kills(self.group)}" if self.group else ""
        return (
            f"{dict(self.kinds)}; budget changes by status {dict(self.budgets)}; engines killed {len(self.killed_s)}; "
            f"resident {min(memory)} to {max(memory)} bytes; descriptors {min(files)} to {max(files)}{charged}"
        )


def put_budget(url: str, share: str, key: str) -> int:
    """The status of the answer; 0 where none came."""
    request = urllib.request.Request(
        f"{url}/admin/budget", json.dumps({"expert_budget": share}).encode(), method="PUT",
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return 0


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def cgroup_of(budget: int) -> Iterator[MemoryCgroup | None]:
    """A cgroup of exactly the budget, where this process may make one."""
    if not can_limit_memory():
        print("no memory cgroup can be made here: going on without")
        yield None
        return
    with limited_memory(budget) as group:
        yield group


def soak(minutes: float, model: str, memory_budget: str, flags: list[str]) -> int:
    budget = parse_size(memory_budget).resolve(0)
    with tempfile.TemporaryDirectory() as folder, cgroup_of(budget) as group:
        key = "admin-of-the-soak"
        (Path(folder) / "key").write_text(key)
        options = [
            "--memory-budget", str(budget), "--max-sequences", str(ROOM), "--max-model-len", "512",
            "--admin-key-file", f"{folder}/key", *flags,
        ]  # fmt: skip
        with daemon(model, *options, cgroup=group.folder if group else None) as running:
            run = Soak(running, time.monotonic() + 60 * minutes, key, group)
            asyncio.run(run.run())
            if running.process.poll() is None:
                run.check_rest()
                print(run.report())
                if running.stop() != 0:
                    run.problems.append("the server did not end well")
            else:
                kills = num_kills(group) if group else 0
                run.problems[:0] = [f"the server ended by itself, {kills} killed", *running.lines[-3:]]
    for problem in run.problems[:20]:
        print(problem)
    print(f"{len(run.problems)} problems in {minutes:g} minutes")
    return 1 if run.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory-budget", default="720MiB")
    options, flags = parser.parse_known_args()
    return soak(options.minutes, options.model, options.memory_budget, flags)


if __name__ == "__main__":
    sys.exit(main())
