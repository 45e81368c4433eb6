"""How child processes come to be: the one that prepares the model, and engines. Who starts them again: `supervisor`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from expertd_engine.config import Config, config_to_json
from expertd_engine.errors import EngineError, ExpertdError
from expertd_server.service import Service


class ChildFailed(ExpertdError):
    """A child process ended the server. `exit_code` is the child's; an empty message was printed by the child."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the class's default, here known for one instance


class Process(Protocol):
    """What is asked of a child process; `asyncio.subprocess.Process` is one."""

    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, signal: int) -> None: ...


class Launcher(Protocol):
    """How children come to be."""

    async def resolve_store(self, service: Service) -> Path:
        """The store to serve, prepared if need be. Raises ChildFailed."""

    async def start_engine(self, store: Path, endpoint: str) -> Process:
        """An engine process that connects to the ZeroMQ `endpoint`."""


class SubprocessLauncher:
    """Children as Python modules of this installation, each a process group of its own: Ctrl-C is for the server, which
    ends them as they should be ended."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def resolve_store(self, service: Service) -> Path:
        config = self._config
        process = await asyncio.create_subprocess_exec(
            *_module("expertd_engine.sources"), config.model, "--cache-dir", str(config.cache_dir.expanduser()),
            "--dtype", config.dtype, "--dense-dtype", config.dense_dtype,
            "--for", "gpu" if config.device == "cuda" else "cpu", "--device", config.device,
            stdout=asyncio.subprocess.PIPE, process_group=0,
        )  # fmt: skip
        try:
            return await self._read_store(process, service)
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()

    async def _read_store(self, process: asyncio.subprocess.Process, service: Service) -> Path:
        assert process.stdout is not None
        store: str | None = None
        async for line in process.stdout:
            said = json.loads(line)
            store = said.get("store", store)
            if "stage" in said:
                service.progressed(str(said["stage"]), float(said["fraction"]))
        code = await process.wait()
        if code != 0:
            raise ChildFailed(code if code > 0 else EngineError.exit_code)
        if store is None:
            raise ChildFailed(EngineError.exit_code, "preparing the model ended without naming a store")
        return Path(store)

    async def start_engine(self, store: Path, endpoint: str) -> Process:
        return await asyncio.create_subprocess_exec(
            *_module("expertd_engine"), "--connect", endpoint, "--store", str(store),
            "--config", config_to_json(self._config), "--server-pid", str(os.getpid()), process_group=0,
        )  # fmt: skip


def _module(name: str) -> Sequence[str]:
    return sys.executable, "-m", name
