"""`make fuzz-inputs`: nearly right messages and stores for some minutes, with fresh seeds; `--seed` replays one.

PYTHONPATH=tests python -m fuzz.run [--minutes 10] [--seed N]
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from expertd_engine.prepare import prepare
from fuzz.frames import FrameTarget
from fuzz.messages import try_engine
from fuzz.stores import try_store
from support.fake_store import write_store
from support.tiny_mixtral import make_mixtral

Try = Callable[[int], object]


def targets(folder: Path, server: FrameTarget) -> dict[str, Try]:
    """What is fuzzed, each given a seed."""
    make_mixtral(folder / "source", num_hidden_layers=2)
    prepare(folder / "source", folder / "store", "float32")
    return {
        "engine messages": try_engine,
        "server messages": server.try_frame,
        "store index": lambda seed: try_store(seed, folder / "store"),
    }


def finding(what: str, attempt: Try, seed: int) -> str | None:
    """What went wrong with this seed, if anything did."""
    try:
        attempt(seed)
    except Exception:
        return f"{what}, seed {seed}: replay with `python -m fuzz.run --seed {seed}`\n{traceback.format_exc()}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.run")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    seed, done = options.seed if options.seed is not None else secrets.randbits(48), 0
    end_s = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder, FrameTarget.running(write_store(Path(folder, "text"))) as server:
        tried = targets(Path(folder), server)
        while done == 0 or (options.seed is None and time.monotonic() < end_s):
            for what, attempt in tried.items():
                problem = finding(what, attempt, seed + done)
                if problem is not None:
                    print(problem)
                    return 1
            done += 1
    print(f"{done} of each of {', '.join(tried)}: clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
