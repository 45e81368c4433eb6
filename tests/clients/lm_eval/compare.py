"""What lm-eval scored through the server, against the dense original under plain transformers.

    compare.py SAMPLES_FOLDER STORE float32|bf16

SAMPLES_FOLDER is what `lm_eval --log_samples --output_path` wrote. float32: every item's log-likelihood within 1e-3,
accuracy and generations equal. bf16, against the same float32 original: at most 0.05 nat a token on average, with what
transformers' own bf16 is off beside it, accuracy within two standard errors of the paired difference. Runs in the
environment that has expertd.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from expertd_engine.sources import find_source

FLOAT32_ITEM = 1e-3
BF16_TOKEN = 0.05


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.open()), key=lambda sample: int(sample["doc_id"]))


class Dense:
    """The dense model; scores and continues text as lm-eval asks a server to."""

    def __init__(self, store: Path, dtype: torch.dtype) -> None:
        source = find_source("demo").path
        self.tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype).eval()

    @torch.inference_mode()
    def score(self, context: str, continuation: str) -> tuple[float, int]:
        """Log-likelihood of the continuation in nats, and its number of tokens."""
        whole = self.tokenizer.encode(context + continuation).ids
        begin = len(self.tokenizer.encode(context).ids)
        logprobs = self.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        return sum(float(logprobs[i - 1, whole[i]]) for i in range(begin, len(whole))), len(whole) - begin

    @torch.inference_mode()
    def continue_(self, context: str, max_tokens: int, until: list[str]) -> str:
        ids = torch.tensor([self.tokenizer.encode(context).ids])
        out = self.model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :].tolist())
        return min((text.split(stop)[0] for stop in until), key=len)


def _best(scores: list[tuple[float, int]]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index][0])


def difference(scores: list[tuple[float, int]], reference: list[tuple[float, int]]) -> str:
    items = [abs(a - b) for (a, _), (b, _) in zip(scores, reference, strict=True)]
    per_token = [item / tokens for item, (_, tokens) in zip(items, reference, strict=True)]
    return f"items at most {max(items):.2e} nat, a token at most {max(per_token):.2e}, mean {mean(per_token):.2e}"


def main(folder: Path, store: Path, kind: str) -> int:
    dense = Dense(store, torch.float32)
    control = Dense(store, torch.bfloat16) if kind == "bf16" else None
    ours: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    rounded: list[tuple[float, int]] = []
    right_here, right_there = [], []
    for sample in samples(folder, "capitals_mc"):
        asked = [sample["arguments"][f"gen_args_{index}"] for index in range(len(sample["resps"]))]
        reference = [dense.score(a["arg_0"], a["arg_1"]) for a in asked]
        scores = [(float(resp[0][0]), tokens) for resp, (_, tokens) in zip(sample["resps"], reference, strict=True)]
        theirs += reference
        ours += scores
        rounded += [control.score(a["arg_0"], a["arg_1"]) for a in asked] if control else []
        right_here.append(_best(scores) == sample["doc"]["answer"])
        right_there.append(_best(reference) == sample["doc"]["answer"])
    print(f"{kind}: {len(ours)} items: {difference(ours, theirs)}")
    if control:
        print(f"transformers' own bf16: {difference(rounded, theirs)}")
    print(f"accuracy {mean(right_here):.3f} here, {mean(right_there):.3f} there")
    differ = 0
    for sample in samples(folder, "capitals_gen"):
        prompt, options = sample["arguments"]["gen_args_0"]["arg_0"], sample["arguments"]["gen_args_0"]["arg_1"]
        differ += dense.continue_(prompt, options["max_gen_toks"], options["until"]) != sample["resps"][0][0]
    print(f"generations that differ: {differ} of {len(samples(folder, 'capitals_gen'))}")
    items = [abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    if kind == "float32":
        return 0 if max(items) <= FLOAT32_ITEM and right_here == right_there and not differ else 1
    per_token = [item / tokens for item, (_, tokens) in zip(items, theirs, strict=True)]
    paired = [int(a) - int(b) for a, b in zip(right_here, right_there, strict=True)]
    error = stdev(paired) / len(paired) ** 0.5
    return 0 if mean(per_token) <= BF16_TOKEN and abs(mean(paired)) <= 2 * error else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
