"""Makes `recorded_run.om.gz` anew: a real daemon on the demo under load, scraped every two seconds.

    python tests/deploy/record.py

Beforehand for a while, so that every rate has an increase to show, and with a small budget, so that experts move.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemon import daemon
from support.demo import CACHE
from support.load import load, scrapes
from support.prometheus import RECORDING, as_openmetrics

FLAGS = ("--expert-budget", "25%", "--memory-budget", "1300MiB", "--max-model-len", "1024", "--cache-dir", str(CACHE))
SECONDS = 40.0


def main() -> None:
    with daemon("demo", *FLAGS) as running, load(running.url):
        recorded = as_openmetrics(list(scrapes(running.url, SECONDS)))
    RECORDING.write_bytes(gzip.compress(recorded.encode(), 9, mtime=0))
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes, {recorded.count(chr(10))} lines")


if __name__ == "__main__":
    main()
