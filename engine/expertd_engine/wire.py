"""What every message between the server and the engine process is made of: frozen, tagged, nothing unknown in it."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Plain data, which msgpack carries under the name of its class."""
