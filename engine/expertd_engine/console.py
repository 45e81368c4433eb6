"""What commands show while they work: bars on a terminal, lines in a log, JSON for a supervisor, one for an error."""

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
    """One bar a stage on stderr; where that is no terminal, a line when a stage begins."""
    if not sys.stderr.isatty():
        yield stage_lines(sys.stderr)
        return
    bars: dict[str, tqdm[NoReturn]] = {}

    def show(stage: str, fraction: float) -> None:
        if stage not in bars:
            _end(bars)
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            bars[stage] = tqdm(total=1.0, desc=stage, bar_format=layout, file=sys.stderr)
        bars[stage].update(fraction - bars[stage].n)

    try:
        yield show
        _end(bars)
    finally:
        for bar in bars.values():  # where it stopped
            bar.close()


def _end(bars: dict[str, tqdm[NoReturn]]) -> None:
    """They are done, those included that never told how far they were."""
    while bars:
        bar = bars.popitem()[1]
        bar.update(1.0 - bar.n)
        bar.close()


def stage_lines(out: TextIO) -> Progress:
    """The name of a stage on `out` when it begins."""
    begun: str | None = None

    def show(stage: str, _fraction: float) -> None:
        nonlocal begun
        if stage != begun:
            begun = stage
            print(f"expertd: {stage}", file=out, flush=True)

    return show


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
