"""The engine process: `python -m expertd_engine --connect ENDPOINT --store DIR --config JSON --server-pid PID`.

Started by the server's supervisor, once for each engine. Says what it is doing with `Progress`, then `Ready`; whatever
ends it otherwise is said with `Fatal` and on standard error, in one line.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a store is complete; nothing is fetched while serving
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# transformers loads PyTorch's compiler, and that Triton where it is installed: 100 MiB of a budget, on a processor that
# never compiles anything.
if not torch.cuda.is_available():
    # None is Python's own word for "import finds none" (language reference, 5.3.1), which the stubs leave out.
    cast("dict[str, ModuleType | None]", sys.modules).setdefault("triton", None)

from expertd_engine.config import config_from_json
from expertd_engine.core import Forward
from expertd_engine.errors import EngineError, ExpertdError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.loop import Channel, EngineLoop
from expertd_engine.messages import Fatal, Progress, Ready
from expertd_engine.pressure import open_pressure
from expertd_engine.reporting import StepMeter
from expertd_engine.startup import Engine, start_engine
from expertd_engine.startup_parts import device_of

if TYPE_CHECKING:
    from expertd_engine.device_startup import DeviceEngine

_PR_SET_PDEATHSIG = 1
_M_ARENA_MAX = -8


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="expertd_engine")
    parser.add_argument("--connect", required=True, help="ZeroMQ endpoint that the server has bound")
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--config", required=True, help="configuration as one JSON object")
    parser.add_argument("--server-pid", required=True, type=int, help="this process ends with that one")
    options = parser.parse_args(arguments)
    _tie_to_parent(options.server_pid)
    channel = Channel(options.connect)
    try:
        _serve(channel, options)
        return 0
    except ExpertdError as error:
        return _fail(channel, error)
    except Exception as error:  # the top of the process: whatever it is, the server must hear of it
        traceback.print_exc()
        return _fail(channel, EngineError(f"{type(error).__name__}: {error}"))
    finally:
        channel.close()


def _serve(channel: Channel, options: argparse.Namespace) -> None:
    config = config_from_json(options.config)
    logging.basicConfig(level=config.log_level.upper(), format="expertd: engine: %(levelname)s: %(message)s")
    store = ExpertStore.open(options.store)
    pressure = open_pressure(options.server_pid) if config.memory_pressure else None
    meters: list[StepMeter] = []

    def wrap(runner: Forward) -> StepMeter:
        meters.append(StepMeter(runner))
        return meters[0]

    def report(stage: str, fraction: float) -> None:
        channel.send(Progress(stage, fraction))

    engine: Engine | DeviceEngine
    if (device := device_of(config, store.index)) is None:
        engine = start_engine(store, config, options.server_pid, report, wrap)
    else:
        from expertd_engine.device_startup import start_on_device  # its kernels need what a box without a card lacks

        engine = start_on_device(store, config, options.server_pid, report, wrap, device)
    channel.send(Ready(engine.info))
    EngineLoop(engine, meters[0], channel, pressure).run()


def _fail(channel: Channel, error: ExpertdError) -> int:
    channel.send(Fatal(error.exit_code, str(error)))
    return error.exit_code


def _tie_to_parent(server_pid: int) -> None:
    """End with the server, whatever ends it; leave signals from the terminal to it; dump stacks on SIGABRT."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server_pid:  # it ended before we asked
        sys.exit(EngineError.exit_code)
    libc.mallopt(_M_ARENA_MAX, 2)  # arenas of threads that come and go would keep freed memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()


if __name__ == "__main__":
    sys.exit(main())
