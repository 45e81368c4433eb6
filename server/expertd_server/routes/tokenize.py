"""/tokenize, /detokenize and /tokenizer_info in vLLM's shapes, so that evaluation tools need no tokenizer files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from expertd_server.admission import BodyShare
from expertd_server.body import read_json
from expertd_server.chat_schemas import MAX_TOOLS, ChatRequest, Messages, Tool, parse_chat
from expertd_server.errors import InvalidRequest, clip, declared
from expertd_server.fields import Body, body_of, parse_fields
from expertd_server.prompts import TextCodec
from expertd_server.service import ServedModel, Service
from expertd_server.sse import while_connected

MAX_TEXT_CHARS = 2**20
"""A longer text is tokenized only if it might be a prompt: a bound on what tokenizing takes of the memory budget."""


MAX_IDS = 2**18

CHAT_FIELDS = ("messages", "tools", "add_generation_prompt", "chat_template_kwargs")


class TokenizeRequest(Body):
    """Body of POST /tokenize: a text, or a conversation as /v1/chat/completions takes it."""

    unsupported: ClassVar[Mapping[str, str]] = {
        name: ChatRequest.unsupported[name] for name in ("chat_template", "continue_final_message")
    }

    model: str = Field("", description="Empty or absent: the model this server serves.")
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS, description="Only with messages.")
    add_generation_prompt: bool = Field(True, description="End the conversation with the beginning of an answer.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables for the template.")
    add_special_tokens: bool | None = Field(
        None, description="What the tokenizer puts around a text, such as BOS. Default: true for a prompt alone."
    )
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
        """The token ids of a text or a conversation. Special tokens written out in a text are those tokens; it may be
        longer than a prompt, but not without bound."""
        with service.bodies.share() as share:
            asked, chat, model = await _read_tokenize(service, request, share)
            return await while_connected(request.receive, _one_at_a_time(turn, lambda: _tokenized(asked, chat, model)))

    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens written out."""
        with service.bodies.share() as share:
            asked, model = await _read_detokenize(service, request, share)
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


async def _read_tokenize(
    service: Service, http: Request, share: BodyShare
) -> tuple[TokenizeRequest, ChatRequest | None, ServedModel]:
    model = service.serving()
    body = await read_json(http, service.config.max_body.resolve(0), share)
    asked = parse_fields(TokenizeRequest, body)
    service.check_model(asked.model, model)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("prompt: give either a prompt or messages", param="prompt")
    chat = None
    if asked.messages is not None:
        chat = parse_chat({name: body[name] for name in CHAT_FIELDS if name in body})
    return asked, chat, model


async def _read_detokenize(service: Service, http: Request, share: BodyShare) -> tuple[DetokenizeRequest, ServedModel]:
    model = service.serving()
    asked = parse_fields(DetokenizeRequest, await read_json(http, service.config.max_body.resolve(0), share))
    service.check_model(asked.model, model)
    _check_ids(asked.tokens, model.info.vocab_size)
    return asked, model


async def _one_at_a_time(turn: asyncio.Lock, work: Callable[[], bytes]) -> Response:
    """The rendered result of `work`, done on a worker thread: a long text is a burden that comes singly."""
    async with turn:
        return Response(await asyncio.to_thread(work), media_type="application/json")


def _check_length(text: str, model: ServedModel) -> None:
    """Raises InvalidRequest for more than tokenizing may cost."""
    limit = max(MAX_TEXT_CHARS, model.info.max_model_len * model.codec.max_token_chars)
    if len(text) > limit:
        raise InvalidRequest(f"prompt: {len(text)} characters; at most {limit} are allowed", param="prompt")


def _check_ids(ids: list[int], vocab_size: int) -> None:
    odd = next((i for i in ids if not 0 <= i < vocab_size), None)
    if odd is not None:
        raise InvalidRequest(
            f"tokens: token id {clip(odd)} is not in the vocabulary; allowed are 0 to {vocab_size - 1}", param="tokens"
        )


def _tokenized(asked: TokenizeRequest, chat: ChatRequest | None, model: ServedModel) -> bytes:
    text = model.chat.plan(chat).prompt if chat is not None else asked.prompt or ""
    _check_length(text, model)
    add_special_tokens = chat is None if asked.add_special_tokens is None else asked.add_special_tokens
    ids = model.codec.ids_of(text, add_special_tokens=add_special_tokens)
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
