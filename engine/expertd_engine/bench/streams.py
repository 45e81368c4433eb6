"""The sequences of an engine under measurement: submits, steps and ends them, and times each step. Owns the clock.

Prompts are random tokens; sampling is greedy and ignores the end of text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from expertd_engine.bench.generated import GeneratedRoutes
from expertd_engine.core import EngineCore
from expertd_engine.errors import EngineError
from expertd_engine.messages import Sampling, Submit, TextInput


class Streams:
    """Of one engine's core."""

    def __init__(self, core: EngineCore, vocab_size: int, seed: int, routes: GeneratedRoutes | None) -> None:
        """`routes`: what is generated, which needs to know how many tokens will come."""
        self.stream_of: dict[int, int] = {}
        """By sequence."""
        self.own_s = 0.0
        """What the bench itself takes of the step that runs: whoever takes it adds it."""
        self._core = core
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)
        self._routes = routes
        self._next_id = 1
        self._outputs: dict[int, int] = {}
        """Tokens so far, by sequence."""

    def step(self) -> float:
        """One step; the seconds that the engine took for it, without what the bench took. Raises EngineError if it
        ended a sequence with an error."""
        began, self.own_s = time.perf_counter(), 0.0
        told = self._core.step(began)
        elapsed_s = time.perf_counter() - began - self.own_s
        for output in told.outputs:
            self._outputs[output.sequence_id] = self._outputs.get(output.sequence_id, 0) + len(output.token_ids)
        for finished in told.finished:
            if finished.error:
                raise EngineError(f"a measured sequence failed: {finished.error}")
        return elapsed_s

    def step_until(self, sequence_ids: Sequence[int], tokens: int) -> list[float]:
        """Step until each of these has as many tokens; the seconds of each step."""
        steps_s = []
        while any(self._outputs.get(sequence_id, 0) < tokens for sequence_id in sequence_ids):
            steps_s.append(self.step())
        return steps_s

    def start(self, prompt: int, tokens: int, count: int) -> list[int]:
        """Submit `count` streams, with room for `tokens` each, and step until all decode: their ids."""
        if self._routes is not None:
            self._routes.reserve(prompt + tokens + count + 2)
        started = [self.submit(prompt, tokens + count + 2, stream) for stream in range(count)]
        self.step_until(started, 1)
        return started

    def submit(self, prompt: int, tokens: int, stream: int) -> int:
        """A sequence of `stream`: its id."""
        sequence_id = self._next_id
        self._next_id += 1
        self.stream_of[sequence_id] = stream
        ids = self._rng.integers(0, self._vocab_size, prompt).tolist()
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._core.submit(Submit(sequence_id, [TextInput(ids)], sampling), time.perf_counter())
        return sequence_id

    def end(self, sequence_ids: Sequence[int]) -> None:
        """These are done with."""
        self._core.abort(sequence_ids, time.perf_counter())
        while self._core.has_work:
            self._core.step(time.perf_counter())
