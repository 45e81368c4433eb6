"""Where a configuration comes from: command line > environment `EXPERTD_*` > YAML file > default; checked, once.

Unknown keys and unknown `EXPERTD_*` variables are errors. Reads the file that it is told to read, and no other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from expertd_engine.config import API_KEY_VARIABLE, ENV_PREFIX, Config, Size, card_options, option_names, parse_size
from expertd_engine.errors import ConfigError

_TRUTH = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration and where each value came from: `flag`, `environment`, a file's path, or `default`."""

    config: Config
    sources: Mapping[str, str]


def load_config(
    flags: Mapping[str, str | None], environment: Mapping[str, str], file: Path | None = None
) -> LoadedConfig:
    """Merge the sources into one checked `Config`.

    `flags` maps option names to text (None or absent: not given); `environment` is the process's own. Raises
    ConfigError for an unknown key, a malformed value (naming option, value and what is allowed) or a contradiction.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(option_names(), "default")
    for source, given in (
        (str(file), _read_yaml(file) if file else {}),
        ("environment", _from_environment(environment)),
        ("flag", {name: text for name, text in flags.items() if text is not None}),
    ):
        for name, raw in given.items():
            if name not in sources:
                raise ConfigError(_unknown(name, source, sources))
            values[name] = _convert(name, raw)
            sources[name] = source
    config = Config(**values)
    _cross_check(config)
    return LoadedConfig(config, sources)


def _unknown(name: str, source: str, known: Iterable[str]) -> str:
    written = f"{ENV_PREFIX}{name.upper()}" if source == "environment" else name
    near = difflib.get_close_matches(name, known, 1)
    meant = f" (meant: {near[0]}?)" if near else ""
    return f"unknown option {written!r} in {source}{meant}: known are {', '.join(sorted(known))}"


def _cross_check(config: Config) -> None:
    if config.max_bodies.resolve(0) < config.max_body.resolve(0):
        raise ConfigError(f"max_bodies: {config.max_bodies} is not allowed: give at least max_body, {config.max_body}")
    if config.device == "cpu" and (unused := card_options(config)):
        raise ConfigError(f"{unused[0]}: not with device: cpu, where it means nothing; leave one of the two out")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {path} must hold `option: value` lines, not a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENV_PREFIX) and name not in (ENV_PREFIX + "CONFIG", API_KEY_VARIABLE)
    }


def _convert(name: str, raw: Any) -> Any:
    """`raw` (text from a flag or variable, or a YAML scalar) as the option's declared type."""
    spec = next(f for f in fields(Config) if f.name == name)
    kind = get_type_hints(Config)[name]
    choices = [kind] if get_origin(kind) is Literal else list(get_args(kind)) or [kind]
    if type(None) in choices:
        if raw is None or (isinstance(raw, str) and raw.lower() in ("", "none", "null")):
            return None
        choices.remove(type(None))
    return _parse(name, choices[0], raw, spec.metadata)


def _parse(name: str, kind: Any, raw: Any, metadata: Mapping[str, Any]) -> Any:
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ConfigError(f"{name}: {raw!r} is not allowed: choose from {', '.join(get_args(kind))}")
        return raw
    if kind is Size:
        if isinstance(raw, bool) or not isinstance(raw, (str, int)):
            raise ConfigError(f"{name}: {raw!r} is not a size such as 512MiB")
        try:
            return parse_size(str(raw), share_allowed=metadata["share"])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if str(raw).lower() in _TRUTH:
            return _TRUTH[str(raw).lower()]
        raise ConfigError(f"{name}: {raw!r} is not allowed: write on or off")
    if kind in (int, float):
        return _parse_number(name, kind, raw, metadata)
    if raw is None or isinstance(raw, (dict, list)) or str(raw) == "":
        raise ConfigError(f"{name}: {raw!r} is not a text value")
    return Path(str(raw)).expanduser() if kind is Path else str(raw)


def _parse_number(name: str, kind: type[int] | type[float], raw: Any, metadata: Mapping[str, Any]) -> int | float:
    low, high = metadata["low"], metadata["high"]
    allowed = f"{'an integer' if kind is int else 'a number'}" + (f" ≥ {low:g}" if low is not None else "")
    allowed += f" and ≤ {high:g}" if high is not None else ""
    try:
        if isinstance(raw, bool) or (kind is int and isinstance(raw, float)):
            raise ValueError
        value = kind(raw)
        if not ((low is None or value >= low) and (high is None or value <= high)):
            raise ValueError  # NaN fails both comparisons
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: {raw!r} is not allowed: give {allowed}") from None
    return value
