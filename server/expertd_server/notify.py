"""Telling systemd how the service is: READY=1 once it serves, STOPPING=1, and the watchdog's beat (sd_notify(3)).

Without NOTIFY_SOCKET nothing is said. The beat stops when the event loop hangs, or when the engine has been silent for
`SILENCE_S` though it serves: then systemd ends the service and starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import MutableMapping

from expertd_server.service import Service

logger = logging.getLogger("expertd.notify")

SILENCE_S = 60.0
"""Twice the silence for which the supervisor kills an engine at work: this is for when that did not help."""

LOOK_S = 0.5


class Notifier:
    """Says each thing once, and beats as often as systemd wants."""

    def __init__(self, service: Service, environment: MutableMapping[str, str]) -> None:
        """Takes its variables *out of* the environment: children speak for themselves alone."""
        self._service = service
        self._address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        environment.pop("WATCHDOG_PID", None)
        self._every_s = int(microseconds) / 2e6 if microseconds.isdigit() else None
        self._beaten_s = float("-inf")
        self._said = ""

    async def run(self) -> None:
        """Follow the service until cancelled."""
        if not self._address:
            return
        try:
            while True:
                self.tick(asyncio.get_running_loop().time())
                await asyncio.sleep(min(LOOK_S, self._every_s or LOOK_S))
        except OSError as error:
            logger.warning("systemd hears nothing", extra={"fields": {"address": self._address, "error": str(error)}})

    def tick(self, now_s: float) -> None:
        """Say what is due at `now_s` of the monotonic clock. Raises OSError where nobody listens."""
        self._tell_state()
        if self._every_s is not None and now_s - self._beaten_s >= self._every_s and self._is_well(now_s):
            self._beaten_s = now_s
            self._say("WATCHDOG=1")

    def _tell_state(self) -> None:
        service = self._service
        status = service.state if service.state != "loading" else f"loading: {service.stage}, {service.progress:.0%}"
        first = {"ready": "READY=1\n", "draining": "STOPPING=1\n"}.get(service.state, "")
        message = f"{first}STATUS={status}"
        if message != self._said:
            self._said = message
            self._say(message)

    def _is_well(self, now_s: float) -> bool:
        """An engine that loads, or is being started again, is its supervisor's to watch."""
        engine = self._service.engine
        return self._service.state != "ready" or now_s - engine.heard_s < SILENCE_S

    def _say(self, message: str) -> None:
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
            speaker.connect(address)
            speaker.sendall(message.encode())
