"""The `expertd` command. Flags derive from the fields of `Config`; every error is one line on standard error.

Exit codes: 0 done, 1 `health` is told no, 2 usage, 3 configuration or model, 4 resources, 5 engine, 128 + n ended by
a second signal n.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from expertd_engine.config import ENV_PREFIX, Config
from expertd_engine.config_sources import LoadedConfig, load_config
from expertd_engine.errors import ExpertdError, UsageError
from expertd_server import __version__, remote

_TOOLS = {
    "fetch": ("expertd_engine.sources", "fetch and prepare a model as `serve` would, and end"),
    "prepare": ("expertd_engine.prepare", "write a checkpoint as an expert store"),
    "convert": ("expertd_engine.convert", "turn a dense model into an MoE checkpoint"),
    "profile": ("expertd_engine.profiling", "measure this box and a model on it, for plans"),
    "plan": ("expertd_engine.plan_command", "say what a budget gives, before it is spent"),
    "bench": ("expertd_engine.bench.cli", "measure speed, beside limits and peers"),
    "trace": ("expertd_engine.lab.trace_command", "record which experts a model's tokens choose"),
    "replay": ("expertd_engine.lab.replay_command", "compare policies and budgets on traces, and recommend"),
    "train-predictor": ("expertd_engine.lab.train_command", "learn to foresee a model's routes"),
}
"""Commands with a parser of their own, imported when called: they import torch."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # what is short for one option today is not tomorrow

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where we can still say what comes of it
        return code
    except ExpertdError as error:
        if str(error):
            print(f"expertd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output has seen enough: `expertd status --watch | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it while it ends
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in _TOOLS:
        return int(importlib.import_module(_TOOLS[arguments[0]][0]).main(arguments[1:]))
    parser, commands = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command in ("health", "status"):
        return remote.run(options, os.environ)
    loaded = _load(options, os.environ)
    if options.command == "check-config":
        print("\n".join(describe(loaded)))
        return 0
    return _serve(loaded.config, lambda: _load(options, os.environ).config)


def _parser() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    """Of the whole command line, and of each command."""
    parser = _Parser(prog="expertd", description="Serve Mixture-of-Experts models inside a byte budget.")
    parser.add_argument("--version", action="version", version=f"expertd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser("serve", help="serve a model over HTTP", description="Serve a model over HTTP.")
    check = commands.add_parser(
        "check-config", help="print the effective configuration and where each value comes from",
        description="Print the effective configuration and where each value comes from.",
    )  # fmt: skip
    for command in (serve, check):
        _add_flags(command)
    remote.add_commands(commands)
    for name, (_, text) in _TOOLS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser, commands.choices


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `Config`, grouped as the fields are; the model is positional too."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_help(_field("model")))
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"YAML file; also {ENV_PREFIX}CONFIG")
    options = [option for option in fields(Config) if option.name != "model"]
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.metadata["group"] for o in options)}
    kinds = get_type_hints(Config)
    for option in options:
        group = groups[option.metadata["group"]]
        flag = "--" + option.name.replace("_", "-")
        if kinds[option.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=_help(option))
        else:
            group.add_argument(flag, metavar=_metavar(kinds[option.name]), help=_help(option))


def _field(name: str) -> Field[object]:
    return next(option for option in fields(Config) if option.name == name)


def _help(option: Field[object]) -> str:
    text = str(option.metadata["help"]).replace("%", "%%")
    return text if option.default is None else f"{text} (default: {str(_as_text(option.default)).replace('%', '%%')})"


def _metavar(kind: object) -> str:
    if get_origin(kind) is not None and all(isinstance(choice, str) for choice in get_args(kind)):
        return "{" + ",".join(get_args(kind)) + "}"
    names = [getattr(part, "__name__", str(part)) for part in get_args(kind) or (kind,) if part is not type(None)]
    return {"int": "N", "float": "X", "Size": "SIZE", "Path": "PATH"}.get(names[0], "TEXT")


def _load(options: argparse.Namespace, environment: Mapping[str, str]) -> LoadedConfig:
    flags = {option.name: _as_text(getattr(options, option.name)) for option in fields(Config)}
    named = options.config or (
        Path(environment[ENV_PREFIX + "CONFIG"]) if environment.get(ENV_PREFIX + "CONFIG") else None
    )
    return load_config(flags, environment, named)


def _as_text(value: object) -> str | None:
    if isinstance(value, bool):
        return "on" if value else "off"
    return None if value is None else str(value)


def describe(loaded: LoadedConfig) -> list[str]:
    """Each option as a line of YAML, with its source as a comment."""
    lines = []
    for option in fields(Config):
        shown = _as_text(getattr(loaded.config, option.name)) or "null"
        lines.append(f"{f'{option.name}: {shown}':<48} # {loaded.sources[option.name]}")
    return lines


def _serve(config: Config, reload: Callable[[], Config]) -> int:
    """`reload` reads the configuration again, as it was read at first."""
    from expertd_server import daemon, logs  # the HTTP stack: not needed to check a configuration
    from expertd_server.auth import KeyRing
    from expertd_server.launcher import SubprocessLauncher

    logs.configure(config.log_level)
    keys = KeyRing.load(config, os.environ)
    # The compute threads are the engine's; a batch of prompts must not spread over all cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    listening = daemon.bind(config.host, config.port)

    async def run() -> int:
        server = daemon.Daemon(config, listening, SubprocessLauncher(config), keys=keys)
        server.handle_signals(reload)
        return await server.run()

    with listening:
        print(f"expertd: listening on http://{config.host}:{listening.getsockname()[1]}", file=sys.stderr)
        return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
