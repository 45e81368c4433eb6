"""llama.cpp under measurement, through the low-level interface of `llama_cpp`: the same prompts, steps and threads.

Its defaults otherwise: memory-mapped file, repacked weights, flash attention where it chooses so.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np

from expertd_engine.bench.protocol import (
    Decoded,
    DecodeRequest,
    DescribeRequest,
    PeerFacts,
    PeerSpec,
    Prefilled,
    PrefillRequest,
    Request,
)
from expertd_engine.errors import EngineError, UsageError
from expertd_engine.memory import peak_rss_bytes

try:
    import llama_cpp
except ImportError as error:
    raise UsageError(f"the peer llama.cpp is not installed ({error}): pip install 'expertd[bench]'") from None

_BATCH_TOKENS = 512


class Peer:
    """A model, its context and a batch to fill."""

    def __init__(self, spec: PeerSpec) -> None:
        """Loads the model. Raises EngineError where llama.cpp refuses it."""
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._streams = spec.streams
        self._threads = spec.threads or len(os.sched_getaffinity(0))
        self._rng = np.random.default_rng(spec.seed)
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(spec.gguf.encode(), parameters)
        if not self._model:
            raise EngineError(f"llama.cpp cannot load {spec.gguf}")
        self._context = llama_cpp.llama_init_from_model(self._model, self._parameters(spec))
        if not self._context:
            raise EngineError(f"llama.cpp cannot make a context of {spec.max_tokens} tokens for {spec.streams} streams")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(max(_BATCH_TOKENS, spec.streams), 0, 1)

    def _parameters(self, spec: PeerSpec) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = spec.streams * spec.max_tokens
        parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
        parameters.n_seq_max = spec.streams
        parameters.n_threads = parameters.n_threads_batch = self._threads
        return parameters

    def serve(self, request: Request) -> Any:
        match request:
            case DecodeRequest():
                return self.decode(request)
            case PrefillRequest():
                return self.prefill(request)
            case DescribeRequest():
                system = llama_cpp.llama_print_system_info().decode()
                return PeerFacts(f"llama-cpp-python {llama_cpp.__version__}", self._threads, system)
            case _:
                raise UsageError(f"the peer cannot do this: {type(request).__name__}")

    def decode(self, request: DecodeRequest) -> Decoded:
        """Time `tokens` steps of all streams, after their prompts and `warm` steps; greedy."""
        last = [self._prompt(stream, request.prompt) for stream in range(self._streams)]
        position = request.prompt
        for _ in range(request.warm):
            last, position = self._step(last, position), position + 1
        began = time.perf_counter()
        for _ in range(request.tokens):
            last, position = self._step(last, position), position + 1
        elapsed_s = time.perf_counter() - began
        self._clear()
        return Decoded(elapsed_s, request.tokens * self._streams, process_peak_bytes=peak_rss_bytes())

    def prefill(self, request: PrefillRequest) -> Prefilled:
        """Time one prompt, alone."""
        if request.decode:
            raise UsageError("the peer's prefill is timed alone, not beside a decode")
        began = time.perf_counter()
        self._prompt(0, request.tokens)
        ttft_s = time.perf_counter() - began
        self._clear()
        return Prefilled(ttft_s, process_peak_bytes=peak_rss_bytes())

    def _prompt(self, stream: int, tokens: int) -> int:
        """Compute a random prompt; the token that follows it."""
        ids = self._rng.integers(0, self._vocab_size, tokens).tolist()
        for start in range(0, tokens, _BATCH_TOKENS):
            piece = ids[start : start + _BATCH_TOKENS]
            for row, token in enumerate(piece):
                self._put(row, token, start + row, stream, logits=start + row == tokens - 1)
            self._run(len(piece))
        return self._argmax(len(piece) - 1)

    def _step(self, last: list[int], position: int) -> list[int]:
        for stream, token in enumerate(last):
            self._put(stream, token, position, stream, logits=True)
        self._run(len(last))
        return [self._argmax(row) for row in range(len(last))]

    def _put(self, row: int, token: int, position: int, stream: int, *, logits: bool) -> None:
        batch = self._batch
        batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
        batch.seq_id[row][0], batch.logits[row] = stream, int(logits)

    def _run(self, tokens: int) -> None:
        self._batch.n_tokens = tokens
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise EngineError(f"llama_decode failed with code {code}")

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
