"""`expertd trace record`: runs text through the engine that serves and records what its routers choose.

Text computed in large steps is routed as it would be token by token (law 7), so it is recorded as if it were decoded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from expertd_engine.bench.perplexity import held_out
from expertd_engine.config import Config
from expertd_engine.console import Progress, progress_bar, run_command
from expertd_engine.errors import EngineError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.lab.recorder import TraceRecorder
from expertd_engine.lab.trace import SUFFIX, header_of
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.sources import resolve
from expertd_engine.startup import Engine, start_engine

WINDOW = 512
"""Tokens of a text that see each other."""
_NO_LIMIT = 2**60


def record(
    store: ExpertStore,
    windows: Sequence[Sequence[int]],
    folder: Path,
    *,
    hidden: bool = False,
    threads: int | None = None,
    progress: Progress,
) -> int:
    """Record the windows into `folder`, where no trace may be; the rows. Raises what starting an engine raises."""
    if folder.is_dir() and any(folder.glob(f"*{SUFFIX}")):
        raise UsageError(f"{folder} holds a trace already: name a new folder")
    recorder = TraceRecorder(folder, header_of(store.index), limit_bytes=_NO_LIMIT, hidden=hidden, unroll=True)
    config = Config(
        model=str(store.path),
        expert_policy="next-use",
        predictor="none",
        prefix_cache=False,
        max_model_len=WINDOW + 1,
        max_sequences=1,
        max_step_tokens=WINDOW,
        threads=threads,
    )
    engine = start_engine(store, config, os.getpid(), lambda stage, fraction: None, lambda runner: runner)
    engine.runner.onlookers = [*engine.runner.onlookers, recorder]
    try:
        for number, window in enumerate(windows):
            progress("record", number / len(windows))
            _feed(engine, number + 1, window)
    finally:
        recorder.close()
        engine.cache.close()
    if recorder.failure is not None:
        raise EngineError(recorder.failure)
    return recorder.rows


def _feed(engine: Engine, number: int, window: Sequence[int]) -> None:
    how = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.core.submit(Submit(number, [TextInput(list(window))], how), 0.0)
    while engine.core.has_work:
        for finished in engine.core.step(0.0).finished:
            if finished.error:
                raise EngineError(f"a window could not be computed: {finished.error}")


def cut(tokenizer: Tokenizer, files: Sequence[Path], tokens: int) -> list[list[int]]:
    """Windows of these files by turns, or of the texts that every Python brings. UsageError if they are too few."""
    count = -(-tokens // WINDOW)
    if not files:
        return [window[:WINDOW] for window in held_out(tokenizer, count)]
    found: list[list[list[int]]] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")[: 16 * tokens]
        except OSError as error:
            raise UsageError(f"text {path} cannot be read: {error.strerror}") from None
        ids = tokenizer.encode(text).ids
        found.append([ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)])
    longest = max(map(len, found))
    turns = [windows[i] for i in range(longest) for windows in found if i < len(windows)]
    if len(turns) < count:
        raise UsageError(f"{tokens} tokens are not to be had: the texts have {len(turns) * WINDOW}")
    return turns[:count]


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd trace`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd trace", description="Record what a model's routers choose.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("record", help="on text; a daemon records its own traffic with --trace-dir")
    one.add_argument("model", metavar="MODEL", help="store, or whatever `expertd serve` takes")
    one.add_argument("folder", type=Path, metavar="DST", help="folder of the trace")
    one.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="plain text (default: some)"
    )
    one.add_argument("--tokens", type=int, default=8192, metavar="N", help="of text (default: 8192)")
    one.add_argument("--hidden", action="store_true", help="what routers see too, to train and judge predictors")
    one.add_argument("--threads", type=int, metavar="N", help="compute threads (default: all cores)")
    one.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        store = ExpertStore.open(resolve(options.model, options.cache_dir.expanduser(), progress=progress))
        windows = cut(Tokenizer.from_file(str(store.path / "tokenizer.json")), options.text, options.tokens)
        rows = record(store, windows, options.folder, hidden=options.hidden, threads=options.threads, progress=progress)
    print(f"{options.folder}: {rows} tokens")
