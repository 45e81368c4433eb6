"""`expertd profile`: measures a box and a model on it, once, and writes `profile.json` into the store. Decides nothing.

The engine that is measured is the one that serves: its threads, its reads, its kernels, its router adapters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import msgspec
import torch
from tokenizers import Tokenizer

from expertd_engine.bench.full_daemon import fill
from expertd_engine.bench.perplexity import WINDOW_TOKENS, all_text, held_out
from expertd_engine.calibration import LogitRecorder, TextEngine, Window
from expertd_engine.config import Config
from expertd_engine.console import Progress, progress_bar, run_command, silent
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import Failed, Load, Priority
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.experts.transfer import Transfers
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.model.token_routes import MapFit, TokenMap, TokenRoutes, write_token_map
from expertd_engine.model.virtual_build import following_tokens, priors_of
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.planning.profile import PROFILE_VERSION, BoxProfile, MemoryProfile, Profile
from expertd_engine.profile_file import write_profile
from expertd_engine.sensitivity import ModelMeasure
from expertd_engine.sources import resolve
from expertd_engine.step_costs import STREAMS, measure_steps

READ_ROUNDS = 15
WINDOW = 128
LONG = 4
"""Times as many tokens, in long windows, tell what whole paths lose: that is in the few tokens after a topic shifts."""
STEPS = 16
FILLED = 256
"""Tokens of each sequence, at most, of a daemon whose memory is measured."""
AT_ONCE = 128
"""Tokens of a step while it is learned where they go."""


def profile(
    store: ExpertStore,
    config: Config,
    tokens: int = 256,
    routings: Sequence[str] = (),
    progress: Progress = silent,
    learned: int = 0,
) -> Profile:
    """Measure. `tokens` of text are computed one by one, once for each MoE layer and three times more; of a model of
    one index four times as many, once for some numbers of whole paths and once more. Of `learned` other ones it is
    learned, and written beside the store, where tokens go in virtual mode; 0: what is there stays.

    Raises what `start_engine` raises, and UsageError for more tokens than there is text.
    """
    windows = _windows(store, tokens)
    progress("reads", 0.0)
    reads = _reads(store, config.io_threads)
    prompts = _windows(store, STREAMS * WINDOW)
    progress("steps", 0.0)
    costs = measure_steps(store, config, prompts, reads, -(-tokens // STREAMS))
    progress("memory", 0.0)
    text = TextEngine(store, config)
    try:
        memory = _memory(text, store, config)
        if learned and text.virtual is not None:
            learn_tokens(text, store, learned, progress)
        progress("routes", 0.0)
        virtual_s = _virtual_step(text)
        if text.paths is not None:
            windows = _windows(store, LONG * tokens, min(WINDOW_TOKENS, text.engine.info.max_model_len - 1))
        model = ModelMeasure(text, store, config, windows, costs).profile(progress, routings)
        kernels, threads = text.engine.info.kernels, torch.get_num_threads()
    finally:
        text.close()
    index = store.index
    return Profile(
        version=PROFILE_VERSION,
        store_id=index.store_id,
        record_bytes=[index.record_bytes(i) for i in range(len(index.layers))],
        num_experts=[layer.num_experts for layer in index.layers],
        top_k=index.top_k,
        box=BoxProfile(
            threads, config.io_threads, kernels, reads, costs.step_s, costs.leave_s, costs.overlap, virtual_s
        ),
        memory=memory,
        model=model,
    )


def learn_tokens(text: TextEngine, store: ExpertStore, tokens: int, progress: Progress = silent) -> None:
    """Learn where tokens go, from the end of the text that quality is measured on at its beginning; write it beside the
    store, and let the engine's virtual mode follow it. Raises UsageError for more tokens than there are."""
    virtual, model = text.virtual, text.engine.runner.model
    assert virtual is not None, "only asked for where there is virtual mode"
    experts = [layer.num_experts for layer in store.index.layers]
    fit = MapFit(lambda ids: model.embeddings(ids).numpy(), experts)
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    windows = [window[:-1] for window in all_text(tokenizer)[: -1 - tokens // WINDOW_TOKENS : -1]]
    for done, window in enumerate(windows):
        progress("where tokens go", done / len(windows))
        text.tell(
            [window[: text.engine.info.max_model_len - 1]], LogitRecorder(virtual, fit), settle=False, at_once=AT_ONCE
        )
    numbers = fit.fit(text.engine.info.vocab_size)
    write_token_map(store.path, numbers, store.index.store_id)
    text.engine.runner.virtual = _following(virtual, numbers, store.index)


def _following(model: VirtualRouting, numbers: TokenMap, index: StoreIndex) -> VirtualRouting:
    """The model's virtual mode as whoever serves the profiled store has it. Made anew: sets, and who chooses their
    swaps, are made for their limits."""
    held = model.held
    held.close()
    sets = VirtualExperts(priors_of(numbers, index), held.sets.top_k, following_tokens(held.sets.limits))
    following = HeldExperts(held.cache, sets, held.room, held.library)
    tokens = TokenRoutes(numbers, index.top_k, held.library)
    return VirtualRouting(model.routers, following, model.score, model.foresight, model.shared_by, tokens)


def _windows(store: ExpertStore, tokens: int, length: int = WINDOW) -> list[Window]:
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    count = -(-tokens // length)
    return [window[:length] for window in held_out(tokenizer, count)]


# ---------------------------------------------------------------- the box


def _reads(store: ExpertStore, threads: int) -> list[float]:
    """Seconds until the last of n random records is there, for n from 1 to three times top-k."""
    most = min(3 * store.index.top_k, sum(layer.num_experts for layer in store.index.layers))
    experts, rng = list(store.experts()), Random(0)
    slab = Slab(most, max(layout.bytes for layout in store.index.layouts))
    with store.open_records() as records:
        transfers = Transfers(records, threads)
        try:
            found = []
            for n in range(1, most + 1):
                rounds = []
                for _ in range(READ_ROUNDS):
                    began = time.perf_counter()
                    for slot, expert in enumerate(rng.sample(experts, n)):
                        view = slab.view(slot, store.index.record_bytes(expert.layer))
                        transfers.submit(Load(slot, expert, slot, Priority.DEMAND), view)
                    for _ in range(n):
                        if isinstance(completion := transfers.completions.get(), Failed):
                            raise StoreError(f"a record cannot be read: {completion.reason}")
                    rounds.append(time.perf_counter() - began)
                found.append(statistics.median(rounds))
        finally:
            transfers.close()
    return found


def _memory(text: TextEngine, store: ExpertStore, config: Config) -> MemoryProfile:
    """With the base that a daemon on the store shows: an engine in this process lacks the server's."""
    measured, info = text.engine.measured, text.engine.info
    memory = MemoryProfile(
        base=measured.base,
        step=measured.step,
        kv_block=measured.kv_block,
        block_tokens=measured.block_tokens,
        available=measured.available,
        max_step_tokens=config.max_step_tokens,
        max_sequences=config.max_sequences,
        max_model_len=info.max_model_len,
    )
    quarter = min(store.index.expert_bytes_total(), text.engine.cache.ledger.budget_bytes) // 4
    flags = {"--threads": torch.get_num_threads(), "--io-threads": config.io_threads,
             "--expert-budget": max(quarter, measured.experts_minimum)}  # fmt: skip
    served = served_bytes(store, memory, flags)
    return msgspec.structs.replace(memory, base=max(memory.base, served - memory.step))


def served_bytes(store: ExpertStore, memory: MemoryProfile, flags: Mapping[str, int]) -> int:
    """Of all processes of a daemon that has served as many sequences at once as it may, its largest step included, but
    for experts and KV."""
    tokens = min(FILLED, memory.max_model_len)
    blocks = max(memory.max_sequences * tokens, memory.max_model_len) // memory.block_tokens + 1
    filled = fill(store, memory, flags, blocks, tokens)
    return filled.peak - filled.experts - filled.kv


def _virtual_step(text: TextEngine) -> float | None:
    """Seconds of one sequence's decode step in virtual mode, with room for half of the experts; None without it."""
    cache, virtual = text.engine.cache, text.any_virtual
    if virtual is None:
        return None
    before = cache.ledger.budget_bytes
    cache.set_budget(min(before, max(virtual.held.room.minimum_bytes, text.engine.info.expert_bytes_total // 2)))
    core, vocabulary = text.engine.core, text.engine.info.vocab_size
    prompt = [(7919 * k + 13) % vocabulary for k in range(8)]
    how = Sampling(max_tokens=3 * STEPS, temperature=1.0, seed=0, ignore_eos=True)
    core.submit(Submit(-1, [TextInput(prompt)], how, mode="virtual"), 0.0)
    times = []
    for _ in range(2 * STEPS):
        began = time.perf_counter()
        core.step(0.0)
        times.append(time.perf_counter() - began)
    core.abort([-1], 0.0)
    core.step(0.0)
    virtual.held.close()
    cache.set_budget(before)
    return statistics.median(times[STEPS:])


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd profile`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="expertd profile", description="Measure this box and a model on it, for `expertd plan` and virtual mode."
    )
    parser.add_argument("model", metavar="MODEL", help="store, or whatever `expertd serve` takes")
    parser.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of text, computed one by one")
    parser.add_argument(
        "--routing", action="append", default=[], metavar="R", help="misses of generated routes too, as for bench"
    )
    parser.add_argument(
        "--learn-tokens", type=int, default=16384, metavar="N", help="of text, from which virtual mode learns where "
        "tokens go; 0: not at all",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: all cores)")
    parser.add_argument("--io-threads", type=int, default=2, metavar="N", help="reading threads")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as for serve")
    parser.add_argument("--max-sequences", type=int, default=32, metavar="N", help="as for serve")
    parser.add_argument("--max-step-tokens", type=int, default=512, metavar="N", help="as for serve")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        store = ExpertStore.open(resolve(options.model, options.cache_dir.expanduser(), progress=progress))
        config = Config(
            model=str(store.path),
            threads=options.threads,
            io_threads=options.io_threads,
            max_model_len=options.max_model_len,
            max_sequences=options.max_sequences,
            max_step_tokens=options.max_step_tokens,
            prefix_cache=False,
        )
        measured = profile(store, config, options.tokens, options.routing, progress, options.learn_tokens)
        print(write_profile(store, measured))
