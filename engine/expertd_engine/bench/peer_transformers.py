"""transformers' own generation on the device: random weights of a store's shape, its best experts implementation.

Run as a process of its own, since model and engine do not fit into one card's memory together: `python -m
expertd_engine.bench.peer_transformers STORE --streams N --prompt P --tokens T` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from expertd_engine.errors import EngineError

IMPLEMENTATIONS = ("batched_mm", "grouped_mm")
"""Of transformers' experts; which is the faster depends on the number of streams. `eager` never is."""
_WARM_TOKENS = 4
_RUNS = 2


def measure(store: Path, streams: int, prompt: int, tokens: int, timeout_s: float) -> dict[str, Any]:
    """What a process of its own finds out: `tok_s` of the best implementation and of each. Raises EngineError."""
    command = [sys.executable, "-m", __name__, str(store), "--streams", str(streams)]
    command += ["--prompt", str(prompt), "--tokens", str(tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise EngineError(f"transformers gave no answer in {timeout_s:.0f} s") from None
    if done.returncode:
        raise EngineError(f"transformers failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="peer_transformers")
    parser.add_argument("store", type=Path)
    for name in ("--streams", "--prompt", "--tokens"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(_run(options.store, options.streams, options.prompt, options.tokens)))


def _run(store: Path, streams: int, prompt: int, tokens: int) -> dict[str, Any]:
    import torch
    import transformers

    model = _random_model(store)
    ids = torch.randint(0, model.config.vocab_size, (streams, prompt), device="cuda")
    speeds: dict[str, float | str] = {}
    for name in IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
            speeds[name] = max(_decode_tok_s(model, ids, tokens) for _ in range(_RUNS))
        except torch.cuda.OutOfMemoryError:
            speeds[name] = "out of memory"
    best = max((speed for speed in speeds.values() if isinstance(speed, float)), default=None)
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"tok_s": best, "implementations": speeds, "version": version, "device": torch.cuda.get_device_name()}


def _random_model(store: Path) -> Any:
    """Made on the device, bf16: no checkpoint is read, and the host never holds the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(store)
    with torch.device("cuda"), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _decode_tok_s(model: Any, ids: Any, tokens: int) -> float:
    """Tokens a second of all streams, without the prompt: a long answer's time less a short one's."""
    short_s, long_s = (_generate_s(model, ids, count) for count in (_WARM_TOKENS, _WARM_TOKENS + tokens))
    return float(len(ids) * tokens / (long_s - short_s))


def _generate_s(model: Any, ids: Any, tokens: int) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
