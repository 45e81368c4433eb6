"""/tokenize, /detokenize and /tokenizer_info in vLLM's shapes, so that evaluation tools need no tokenizer files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from expertd_server.body import read_json
from expertd_server.errors import InvalidRequest, clip, declared
from expertd_server.fields import Body, body_of, parse_fields
from expertd_server.prompts import TextCodec
from expertd_server.service import ServedModel, Service
from expertd_server.sse import while_connected

MAX_TEXT_CHARS = 2**20
"""A longer text is tokenized only if it might be a prompt: a bound on what tokenizing takes of the memory budget."""


MAX_IDS = 2**18


class TokenizeRequest(Body):
    """Body of POST /tokenize."""

    model: str = Field("", description="Empty or absent: the model this server serves.")
    prompt: str
    add_special_tokens: bool = Field(True, description="What the tokenizer puts around a text, such as BOS.")
    return_token_strs: bool = False


class Tokenized(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str = Field("", description="Empty or absent: the model this server serves.")
    tokens: list[int] = Field(max_length=MAX_IDS)


class Detokenized(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`. Each is also there under /v1."""
    routes = APIRouter()
    turn = asyncio.Lock()

    async def tokenize(request: Request) -> Response:
        """The token ids of a text. Special tokens written out in it are those tokens; longer than a prompt may be, but
        not without bound."""
        asked, model = await _read_tokenize(service, request)
        return await while_connected(request.receive, _one_at_a_time(turn, lambda: _tokenized(asked, model)))

    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens written out."""
        asked, model = await _read_detokenize(service, request)
        return await while_connected(request.receive, _one_at_a_time(turn, lambda: _detokenized(asked, model)))

    async def tokenizer_info() -> dict[str, Any]:
        """What the checkpoint says of its tokenizer, chat template included."""
        return _info(service.serving().codec)

    _add(routes, "/tokenize", tokenize, TokenizeRequest, Tokenized)
    _add(routes, "/detokenize", detokenize, DetokenizeRequest, Detokenized)
    responses = dict(declared(401, 500, 503))
    routes.add_api_route("/tokenizer_info", tokenizer_info, responses=responses)
    routes.add_api_route("/v1/tokenizer_info", tokenizer_info, include_in_schema=False)
    return routes


def _add(
    routes: APIRouter,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    body: type[Body],
    answer: type[BaseModel],
) -> None:
    routes.add_api_route(
        path, endpoint, methods=["POST"], response_model=answer,
        responses=dict(declared(400, 401, 404, 413, 415, 500, 503)), openapi_extra=body_of(body),
    )  # fmt: skip
    routes.add_api_route("/v1" + path, endpoint, methods=["POST"], response_model=None, include_in_schema=False)


async def _read_tokenize(service: Service, http: Request) -> tuple[TokenizeRequest, ServedModel]:
    model = service.serving()
    asked = parse_fields(TokenizeRequest, await read_json(http, service.config.max_body.resolve(0)))
    service.check_model(asked.model, model)
    _check_length(asked.prompt, model)
    return asked, model


async def _read_detokenize(service: Service, http: Request) -> tuple[DetokenizeRequest, ServedModel]:
    model = service.serving()
    asked = parse_fields(DetokenizeRequest, await read_json(http, service.config.max_body.resolve(0)))
    service.check_model(asked.model, model)
    _check_ids(asked.tokens, model.info.vocab_size)
    return asked, model


async def _one_at_a_time(turn: asyncio.Lock, work: Callable[[], bytes]) -> Response:
    """The rendered result of `work`, done on a worker thread: a long text is a burden that comes singly."""
    async with turn:
        return Response(await asyncio.to_thread(work), media_type="application/json")


def _check_length(text: str, model: ServedModel) -> None:
    limit = max(MAX_TEXT_CHARS, model.info.max_model_len * model.codec.max_token_chars)
    if len(text) > limit:
        raise InvalidRequest(f"prompt: {len(text)} characters; at most {limit} are allowed", param="prompt")


def _check_ids(ids: list[int], vocab_size: int) -> None:
    odd = next((i for i in ids if not 0 <= i < vocab_size), None)
    if odd is not None:
        raise InvalidRequest(
            f"tokens: token id {clip(odd)} is not in the vocabulary; allowed are 0 to {vocab_size - 1}", param="tokens"
        )


def _tokenized(asked: TokenizeRequest, model: ServedModel) -> bytes:
    ids = model.codec.ids_of(asked.prompt, add_special_tokens=asked.add_special_tokens)
    strings = [model.codec.token_string(i) for i in ids] if asked.return_token_strs else None
    return msgspec.json.encode(
        {"count": len(ids), "max_model_len": model.info.max_model_len, "tokens": ids, "token_strs": strings}
    )


def _detokenized(asked: DetokenizeRequest, model: ServedModel) -> bytes:
    return msgspec.json.encode({"prompt": model.codec.decode_all(asked.tokens)})


def _info(codec: TextCodec) -> dict[str, Any]:
    """The settings with special tokens as plain text: checkpoints write them with or without their flags."""
    info = {
        name: value["content"] if isinstance(value, dict) and "content" in value else value
        for name, value in codec.settings.items()
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None, **info}
