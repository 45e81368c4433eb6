"""llama.cpp's logits of a GGUF file, through the low-level interface of `llama_cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def llama_logits(path: Path, ids: list[int]) -> Tensor:
    """`[tokens, vocabulary]` in float32, without flash attention and with float32 keys and values. Skips without
    llama.cpp; fails where it cannot load the file.
    """
    llama = pytest.importorskip("llama_cpp")
    said: list[str] = []
    log = llama.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace")))
    llama.llama_log_set(log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, "".join(said)
    try:
        return _decode(llama, model, ids)
    finally:
        llama.llama_model_free(model)
        llama.llama_log_set(llama.llama_log_callback(0), ctypes.c_void_p(0))


def _decode(llama: Any, model: Any, ids: list[int]) -> Tensor:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(len(ids), 64)
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, parameters)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for row, token in enumerate(ids):
        batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, row, 1
        batch.seq_id[row][0], batch.logits[row] = 0, 1
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), (size,)) for row in range(len(ids))]
    found = torch.from_numpy(np.stack(rows))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return found
