"""Who may ask for what: API keys, the admin key, and the few routes that need none.

Everything is denied unless it is listed here as public, so that a route added tomorrow, or a path spelt another way, is
closed by itself. Only digests of keys are kept, and they are compared in constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from expertd_engine.config import API_KEY_VARIABLE, Config
from expertd_engine.errors import ConfigError
from expertd_server.errors import InvalidApiKey, KeyLacksScope, error_response

ADMIN_PREFIX = "/admin"
"""Routes under it take the admin key alone."""

PUBLIC_PATHS = frozenset({"/live", "/livez", "/ping", "/ready", "/readyz", "/health", "/v1/health", "/version"})
"""Routes for probes: they tell nothing of anybody's requests."""

METRICS_PATHS = frozenset({"/metrics", "/metrics/"})
"""Public only where the operator says so."""

PAGE_PATH = "/ui"
"""The page for browsers, which can show a key by HTTP's Basic scheme alone."""

_KEY = re.compile(r"[!-~]{1,512}")
_OWNER = "expertd.owner"


def owner(scope: Mapping[str, Any]) -> str:
    """Whose request this is, for bounds per key: a digest's beginning; empty where no key is asked for."""
    return str(scope[_OWNER])


class Owner(NamedTuple):
    """Who has shown a key."""

    name: str
    """A digest's beginning."""
    is_admin: bool


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Digests of the keys in force. No API keys: everybody may ask; no admin key: nobody may administer."""

    api: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, api: Iterable[str] = (), admin: Iterable[str] = ()) -> KeyRing:
        """A ring of these keys, each given in the clear."""
        return cls(tuple(map(_digest, api)), tuple(map(_digest, admin)))

    @classmethod
    def load(cls, config: Config, environment: MutableMapping[str, str]) -> KeyRing:
        """The keys of the configured files and of the environment, where they are *taken out*: no child process
        inherits them. Raises ConfigError naming the file or variable, never a key."""
        api = _split(environment.pop(API_KEY_VARIABLE, ""), API_KEY_VARIABLE)
        if config.api_key_file is not None:
            api += _read(config.api_key_file)
        admin = _read(config.admin_key_file) if config.admin_key_file is not None else []
        if config.max_per_key is not None and not api:
            raise ConfigError("max_per_key: there is no API key to count for; give keys, or leave the option out")
        return cls.of(api, admin)

    def find(self, presented: Iterable[str]) -> Owner | None:
        """Of the first of the `presented` keys that is in force."""
        for digest in map(_digest, presented):
            is_admin, is_api = _among(digest, self.admin), _among(digest, self.api)
            if is_admin or is_api:
                return Owner(digest.hex()[:16], is_admin)
        return None


NO_KEYS = KeyRing()
"""Everybody may ask, nobody may administer."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _among(digest: bytes, digests: Iterable[bytes]) -> bool:
    """Compares with all of them, whichever matches: how long it takes tells nothing."""
    return sum([hmac.compare_digest(digest, other) for other in digests]) > 0


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the key file {path}: {reason}") from None
    keys = _split("\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")), str(path))
    if not keys:
        raise ConfigError(f"the key file {path} holds no key: write one on each line")
    return keys


def _split(text: str, source: str) -> list[str]:
    keys = re.split(r"[,\s]+", text.strip()) if text.strip() else []
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{source}: key {number} is not allowed: give 1 to 512 printable ASCII characters")
    return keys


class Authentication:
    """ASGI middleware before every route. Knows paths only as the routes see them: decoded, otherwise as sent."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, public_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._public = PUBLIC_PATHS | (METRICS_PATHS if public_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = self._keys.find(_presented(Headers(scope=scope)))
            scope[_OWNER] = found.name if found else ""
            refusal = self._refusal(scope, found)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, found: Owner | None) -> InvalidApiKey | KeyLacksScope | None:
        path = scope["path"]
        if path in self._public and scope["method"] in ("GET", "HEAD"):
            return None
        if path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/"):
            if not self._keys.admin:
                return InvalidApiKey(
                    "this route needs an admin key, and this server has none: start it with --admin-key-file"
                )
            if found is None:
                return InvalidApiKey("this route needs the admin key, as `Authorization: Bearer KEY`")
            return None if found.is_admin else KeyLacksScope("this route needs the admin key; the key given is not it")
        if self._keys.api and found is None:
            error = InvalidApiKey("this server needs an API key, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`")
            if path == PAGE_PATH:
                error.headers["www-authenticate"] = 'Basic realm="expertd", charset="UTF-8"'  # the browser asks for it
            return error
        return None


def _password(credentials: str) -> Iterator[str]:
    """A browser's way to show a key: `name:key` in base64. The name means nothing."""
    with suppress(binascii.Error, ValueError):
        password = base64.b64decode(credentials, validate=True).decode("latin-1").partition(":")[2]
        if password:
            yield password


def _presented(headers: Headers) -> Iterator[str]:
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            yield key.strip()
        elif scheme.lower() == "basic":
            yield from _password(key.strip())
    yield from headers.getlist("x-api-key")
