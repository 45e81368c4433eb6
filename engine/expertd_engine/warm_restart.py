"""Keeps what an engine knew of its experts beside the store, and gives it to the next one. Owns the file.

The next engine is ready first; then it loads, where there is room and nothing better to read. On a device, whose slots
are filled before it serves, they are filled with that.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import Remember

if TYPE_CHECKING:
    from expertd_engine.experts.device_cache import DeviceCache

logger = logging.getLogger(__name__)

NAME = "residency.bin"
VERSION = 1
EVERY_S = 60.0


class Kept(msgspec.Struct, frozen=True):
    """The file, in MessagePack."""

    store_id: str
    policy: str
    remember: Remember
    version: int = VERSION


class WarmRestart:
    """Of one engine. What cannot be read or written costs a warning and warmth, nothing else."""

    def __init__(self, folder: Path, store_id: str, policy: str, cache: ExpertCache | DeviceCache) -> None:
        self._path = folder / NAME
        self._store_id, self._policy = store_id, policy
        self._cache = cache
        self._kept_s = 0.0
        self._kept_lookups = 0
        self._may_write = True
        self._is_recalled = False

    @property
    def is_recalling(self) -> bool:
        return self._cache.ledger.is_refilling

    def recall(self) -> None:
        """Begin to load what an earlier engine held; once."""
        if self._is_recalled:
            return
        self._is_recalled = True
        try:
            kept = msgspec.msgpack.decode(self._path.read_bytes(), type=Kept)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("starting cold: cannot read %s: %s", self._path, error)
            return
        experts = self._cache.ledger.experts_per_layer
        named = [*kept.remember.residents, *(use.expert for use in kept.remember.uses)]
        sound = all(0 <= e.layer < len(experts) and 0 <= e.expert < experts[e.layer] for e in named)
        if (kept.store_id, kept.version) != (self._store_id, VERSION) or not sound:
            logger.warning("starting cold: %s is of another store or version", self._path)
            return
        uses = kept.remember.uses if kept.policy == self._policy else ()  # another policy's weights mean nothing
        self._cache.recall(Remember(uses, kept.remember.residents))

    def tick(self, now_s: float) -> None:
        """Keep it from time to time, if anything was used since."""
        if now_s - self._kept_s >= EVERY_S:
            self._kept_s = now_s
            if self._cache.ledger.counters.lookups() != self._kept_lookups:
                self.keep()

    def keep(self) -> None:
        """Write the file, whole or not at all."""
        ledger = self._cache.ledger
        if not self._may_write or not ledger.counters.lookups():
            return
        self._kept_lookups = ledger.counters.lookups()
        partial = self._path.with_name(f".{NAME}.{os.getpid()}")
        kept = Kept(self._store_id, self._policy, ledger.recollection())
        try:
            partial.write_bytes(msgspec.msgpack.encode(kept))
            os.replace(partial, self._path)
        except OSError as error:
            self._may_write = False
            partial.unlink(missing_ok=True)
            logger.warning("the next start will be cold: cannot write %s: %s", self._path, error.strerror)
