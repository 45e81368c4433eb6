"""/tokenize, /detokenize and /tokenizer_info: vLLM's shapes, at the root and under /v1."""

from __future__ import annotations

import pytest

from support.fake_store import END, MAX_MODEL_LEN, VOCAB_SIZE, ids_of
from support.running_server import Server


@pytest.mark.parametrize("base", ["", "/v1"])
def test_text_becomes_ids_and_back(server: Server, base: str) -> None:
    text = "Hé<|endoftext|>"
    body = server.http.post(f"{base}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == ids_of(text)
    assert (body["count"], body["max_model_len"]) == (4, MAX_MODEL_LEN)
    assert body["token_strs"] == ["H", "Ã", "©", "<|endoftext|>"]
    assert server.http.post(f"{base}/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}


def test_a_conversation_becomes_the_ids_that_its_template_makes(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    whole = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    bare = server.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert whole[: len(bare)] == bare != whole
    answer = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(whole)


def test_strings_come_only_where_asked_for(server: Server) -> None:
    assert server.http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json() == {
        "count": 1, "max_model_len": MAX_MODEL_LEN, "tokens": ids_of("a"), "token_strs": None,
    }  # fmt: skip


def test_an_empty_text_has_no_tokens(server: Server) -> None:
    assert server.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_text_longer_than_the_window_is_tokenized_too(server: Server) -> None:
    assert server.http.post("/tokenize", json={"prompt": "a" * 50_000}).json()["count"] == 50_000


def test_the_tokenizers_own_settings_are_told(server: Server) -> None:
    for path in ("/tokenizer_info", "/v1/tokenizer_info"):
        info = server.http.get(path).json()
        assert info["eos_token"] == "<|endoftext|>"
        assert info["tokenizer_class"]
        assert "messages" in info["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"), ("/tokenize", {"messages": "a"}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {"tokens": "abc"}, "tokens"), ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"), ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [[1]]}, "tokens"), ("/detokenize", {}, "tokens"),
    ],
)  # fmt: skip
def test_row_53_bad_values_are_400_by_name(server: Server, path: str, body: object, param: str) -> None:
    response = server.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_another_model_is_404(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [END]})):
        response = server.http.post(path, json={**body, "model": "other"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
