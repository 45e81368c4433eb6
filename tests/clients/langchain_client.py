"""LangChain's OpenAI package, which sends `max_completion_tokens` alone."""

from __future__ import annotations

import os
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

URL = os.environ["EXPERTD_URL"] + "/v1"
QUESTION = "What is the capital of France? Answer in one word."


class LookUp(BaseModel):
    """Look a city up."""

    model_config = ConfigDict(extra="forbid")  # so that a small model, too, comes to an end

    city: Literal["Paris", "Rome"]


def main() -> None:
    model = ChatOpenAI(model="demo", base_url=URL, api_key="unused", temperature=0, max_tokens=16, max_retries=0)
    answer = model.invoke(QUESTION)
    assert "Paris" in answer.content, answer
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == answer.content
    called = model.bind_tools([LookUp], tool_choice="required").invoke(QUESTION, max_completion_tokens=64)
    assert [call["name"] for call in called.tool_calls] == ["LookUp"], called
    found = model.with_structured_output(LookUp, method="json_schema").invoke(QUESTION, max_completion_tokens=64)
    assert isinstance(found, LookUp), found
    text = OpenAI(model="demo", base_url=URL, api_key="unused", temperature=0, max_tokens=8, max_retries=0)
    assert text.invoke("The capital of France is").startswith(" Paris")
    print("langchain-openai: ok")


if __name__ == "__main__":
    main()
