"""Runs contenders in turn, pair after pair, so that all see the same moods of the box. Keeps what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from expertd_engine.bench.contender import Contender, Lost
from expertd_engine.bench.protocol import Request
from expertd_engine.bench.stats import order_of

T = TypeVar("T")


@dataclass(slots=True)
class Runner(Generic[T]):
    """One line of the table: who is asked, what, and what came of it. Several may share a contender."""

    name: str
    contender: Contender
    request: Request
    samples: list[T] = field(default_factory=list)
    lost: str | None = None
    """Why there are no more samples."""


def enter(stack: ExitStack, runners: Sequence[Runner[T]]) -> None:
    """Start every contender once; those that cannot start are lost."""
    started: dict[int, str | None] = {}
    for runner in runners:
        key = id(runner.contender)
        if key not in started:
            try:
                stack.enter_context(runner.contender)
                started[key] = None
            except Lost as reason:
                started[key] = str(reason)
        runner.lost = started[key]


def race(runners: Sequence[Runner[T]], pairs: int, kind: type[T], between: Callable[[], None]) -> None:
    """`pairs` rounds of all runners that are still there; `between` is called before each round."""
    for pair in range(pairs):
        between()
        for index in order_of(len(runners), pair):
            runner = runners[index]
            if runner.lost is None:
                try:
                    runner.samples.append(runner.contender.ask(runner.request, kind))
                except Lost as reason:
                    _lose(runners, runner.contender, str(reason))


def _lose(runners: Sequence[Runner[T]], contender: Contender, reason: str) -> None:
    for runner in runners:
        if runner.contender is contender:
            runner.lost = reason


def paired(one: Runner[T], other: Runner[T]) -> tuple[list[T], list[T]]:
    """The samples of the rounds that both finished."""
    count = min(len(one.samples), len(other.samples))
    return one.samples[:count], other.samples[:count]
