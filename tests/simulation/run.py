"""`python -m simulation.run`: replay a seed, or run fresh ones until one fails.

python -m simulation.run --seed 17            replay
python -m simulation.run --fresh 20000        so many seeds never tried before, on all cores
python -m simulation.run --fresh 0            without end
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from simulation.world import World

SEEDS = Path(__file__).with_name("seeds.txt")
"""Seeds that failed once: one on each line, with what they found."""


def replay_command(seed: int) -> str:
    return f"PYTHONPATH=tests python -m simulation.run --seed {seed}"


def known_seeds() -> list[int]:
    lines = SEEDS.read_text(encoding="utf-8").splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


def failure_of(seed: int) -> str | None:
    """Why the world of this seed fails, if it does, and how to see it again."""
    try:
        World(seed).run()
    except Exception:
        return f"seed {seed} fails. Replay: {replay_command(seed)}\n{traceback.format_exc()}"
    return None


def fresh_seeds(count: int) -> Iterator[int]:
    """From a random place on, `count` of them; 0: without end."""
    start, done = secrets.randbits(48), 0
    while not count or done < count:
        yield start + done
        done += 1


def judge(outcomes: Iterable[str | None]) -> int:
    """Tell how it goes; note the first failure in the seed file. Returns the exit code."""
    began, done = time.monotonic(), 0
    for done, failure in enumerate(outcomes, 1):
        if failure is not None:
            print(failure)
            seed, story = failure.split()[1], failure.strip().splitlines()[-1]
            with SEEDS.open("a", encoding="utf-8") as file:
                file.write(f"{seed}  {story[:160]}\n")
            return 1
        if done % 1000 == 0:
            print(f"{done} seeds passed in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{done} seeds passed in {time.monotonic() - began:.0f} s")
    return 0


def run_fresh(count: int) -> int:
    """Run fresh seeds on all cores, so many or without end, to the first that fails."""
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        return judge(pool.imap_unordered(failure_of, fresh_seeds(count), chunksize=20))


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation.run")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--fresh", type=int, default=0, help="how many fresh ones; 0: without end")
    options = parser.parse_args()
    if options.seed is None:
        return run_fresh(options.fresh)
    World(options.seed).run()
    print(f"seed {options.seed} passes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
