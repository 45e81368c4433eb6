"""Lets the dense model answer chat prompts, in batches, and writes the conversations as texts: the domain `chat`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from expertd_engine.console import Progress, progress_bar, run_command, silent
from expertd_engine.refactor.demo.prompts import FOLLOW_UPS, prompts
from expertd_engine.refactor.dense import Dense, open_dense

_FOLLOW_UP_SHARE = 0.15
_NEW_TOKENS = 96
_NEW_TOKENS_OF_OWN = 176
_ROWS = 2048
_QUESTION_TOKENS = 56
_PROMPT_TOKENS = 224
_PER_FILE = 50

Conversation = list[dict[str, str]]


def converse(
    dense: Dense,
    asked: Sequence[str],
    *,
    new_tokens: int = _NEW_TOKENS,
    rows: int = _ROWS,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Conversation]:
    """One or two turns for each prompt, sampled at temperature 0.3 among the 50 likeliest tokens, each of at most
    `new_tokens` tokens.
    """
    conversations: list[Conversation] = [[{"role": "user", "content": prompt}] for prompt in asked]
    torch.manual_seed(seed)
    _answer(dense, conversations, new_tokens, rows, progress)
    generator = random.Random(seed)
    again = [one for one in conversations if generator.random() < _FOLLOW_UP_SHARE]
    for one in again:
        one.append({"role": "user", "content": generator.choice(FOLLOW_UPS)})
    _answer(dense, again, new_tokens, rows, progress)
    return conversations


def questions(dense: Dense, count: int, seed: int = 0) -> list[str]:
    """Prompts that the model thinks of by itself, at most `count` and all different: what it sampled, at temperature 1
    among the 100 likeliest tokens, where its chat template has the user speak. Those that came to no end are left out.
    """
    mark = "PROMPT"
    text = dense.tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    begin: list[int] = dense.tokenizer(text.split(mark)[0], add_special_tokens=False)["input_ids"]
    torch.manual_seed(seed)
    found = _sample(dense, [begin] * count, _QUESTION_TOKENS, temperature=1.0, top_k=100)
    ended = found[(found == dense.end_of_text).any(dim=1)]
    texts = dense.tokenizer.batch_decode(ended, skip_special_tokens=True)
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def render(dense: Dense, conversation: Conversation) -> str:
    """The conversation as the model's chat template has it."""
    text: str = dense.tokenizer.apply_chat_template(conversation, tokenize=False)
    return text


def write_texts(dense: Dense, conversations: Sequence[Conversation], folder: Path) -> list[Path]:
    """Files of conversations that came to an answer, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [render(dense, one).strip() for one in conversations if one[-1]["content"]]
    paths = []
    for number in range(0, len(texts), _PER_FILE):
        path = folder / f"{number // _PER_FILE:05}.txt"
        path.write_text("\n\n".join(texts[number : number + _PER_FILE]), encoding="utf-8")
        paths.append(path)
    return paths


def _answer(dense: Dense, conversations: list[Conversation], new_tokens: int, rows: int, progress: Progress) -> None:
    """Append the assistant's turn to each, batches of like length together."""
    encoded = [_encode(dense, one) for one in conversations]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for begin in range(0, len(order), rows):
        batch = order[begin : begin + rows]
        for i, answer in zip(batch, _generate(dense, [encoded[i] for i in batch], new_tokens), strict=True):
            conversations[i].append({"role": "assistant", "content": answer})
        progress("answers", min(1.0, (begin + rows) / len(order)))


def _encode(dense: Dense, conversation: Conversation) -> list[int]:
    text = dense.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids: list[int] = dense.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-_PROMPT_TOKENS:]


def _generate(dense: Dense, encoded: list[list[int]], new_tokens: int) -> list[str]:
    found = _sample(dense, encoded, new_tokens, temperature=0.3, top_k=50)
    texts: list[str] = dense.tokenizer.batch_decode(found, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _sample(dense: Dense, encoded: list[list[int]], count: int, *, temperature: float, top_k: int) -> torch.Tensor:
    """What follows each, `[rows, at most count]`, the end-of-text token after its end."""
    longest = max(map(len, encoded))
    pad = dense.end_of_text
    device = dense.device
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in encoded], device=device)
    with torch.inference_mode():
        out: torch.Tensor = dense.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, pad_token_id=pad,
            eos_token_id=dense.end_of_text, do_sample=True, temperature=temperature, top_k=top_k, top_p=1.0,
        )  # fmt: skip
    return out[:, longest:]


def _own(dense: Dense, count: int) -> list[str]:
    found: dict[str, None] = {}
    for seed in range(-(-count // _ROWS)):
        found |= dict.fromkeys(questions(dense, min(_ROWS, count), seed))
    return list(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expertd_engine.refactor.demo.answers", description=__doc__)
    parser.add_argument("source", type=Path, help="the dense model: checkpoint folder or GGUF file")
    parser.add_argument("texts", type=Path, help="folder that demo.texts made; `chat` is added to it")
    parser.add_argument("--count", type=int, default=20_400, help="prompts (default: 20400)")
    parser.add_argument("--own", type=int, metavar="COUNT", help="instead, at most COUNT prompts that the "
                        "model thinks of by itself, as the domain `own`")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    dense = open_dense(options.source, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    with progress_bar() as progress:
        asked = _own(dense, options.own) if options.own else prompts(options.texts, options.count)
        new_tokens = _NEW_TOKENS_OF_OWN if options.own else _NEW_TOKENS
        conversations = converse(dense, asked, new_tokens=new_tokens, progress=progress)
    paths = write_texts(dense, conversations, options.texts / ("own" if options.own else "chat"))
    print(json.dumps({"conversations": len(conversations), "files": len(paths)}))


if __name__ == "__main__":
    raise SystemExit(main())
