"""What commands show while they work: a bar for people, JSON lines for a supervisor, one line for an error."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from tqdm import tqdm

from expertd_engine.errors import ExpertdError

Progress = Callable[[str, float], None]
"""Called with the stage's name and how much of it is done, 0 to 1."""


def silent(_stage: str, _fraction: float) -> None:
    """Show nothing."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar a stage on stderr; nothing where stderr is not a terminal."""
    bars: dict[str, tqdm[NoReturn]] = {}

    def show(stage: str, fraction: float) -> None:
        if stage not in bars:
            _close(bars)
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            bars[stage] = tqdm(total=1.0, desc=stage, bar_format=layout, disable=None, file=sys.stderr)
        bars[stage].update(fraction - bars[stage].n)

    try:
        yield show
    finally:
        _close(bars)


def _close(bars: dict[str, tqdm[NoReturn]]) -> None:
    while bars:
        bars.popitem()[1].close()


def json_lines(out: TextIO) -> Progress:
    """`{"stage":…, "fraction":…}` lines on `out`, at most one for each percent of a stage."""
    shown: tuple[str, int] | None = None

    def show(stage: str, fraction: float) -> None:
        nonlocal shown
        if shown != (stage, int(fraction * 100)):
            shown = (stage, int(fraction * 100))
            print(json.dumps({"stage": stage, "fraction": round(fraction, 4)}), file=out, flush=True)

    return show


def both(first: Progress, second: Progress) -> Progress:
    """Report to two places."""

    def show(stage: str, fraction: float) -> None:
        first(stage, fraction)
        second(stage, fraction)

    return show


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; an error meant for the user becomes one line on stderr and its exit code."""
    try:
        command()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ExpertdError as error:
        print(f"expertd: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
