"""LiteLLM, which sends nulls for what was not asked for, and a prompt as a list."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no network

import litellm

URL = os.environ["EXPERTD_URL"] + "/v1"
WHERE = {"api_base": URL, "api_key": "unused", "num_retries": 0}
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def main() -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    whole = litellm.text_completion(model="text-completion-openai/demo", **asked, **WHERE)
    assert whole.choices[0].text.startswith(" Paris"), whole
    chunks = litellm.text_completion(model="text-completion-openai/demo", **asked, **WHERE, stream=True)
    assert "".join(c.choices[0].text or "" for c in chunks) == whole.choices[0].text
    for provider in ("openai", "hosted_vllm"):
        chat = {"model": f"{provider}/demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **WHERE}
        answer = litellm.completion(**chat)
        assert "Paris" in answer.choices[0].message.content, answer
        pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**chat, stream=True)]
        assert "".join(pieces) == answer.choices[0].message.content, provider
    print("litellm: ok")


if __name__ == "__main__":
    main()
