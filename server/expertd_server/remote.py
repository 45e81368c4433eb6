"""`expertd health` and `expertd status`: what a probe and a person ask a running server. Needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from expertd_engine.config import API_KEY_VARIABLE, ENV_PREFIX
from expertd_engine.errors import UsageError

NOT_WELL = 1
"""Exit code of `health` for a server that does not answer or takes no requests."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_commands(commands: Any) -> None:
    """The two commands' parsers, into `commands` of the main one."""
    health = commands.add_parser("health", help="ask a running server whether it takes requests: exit code 0 or 1")
    health.add_argument("--live", action="store_true", help="whether it runs at all, loading or not, instead")
    status = commands.add_parser("status", help="show budgets, work and experts of a running server")
    status.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="S", help="again every S seconds (2)")
    status.add_argument("--json", action="store_true", help="the numbers as the server gives them")
    for command in (health, status):
        command.add_argument("--url", help="the server (default: EXPERTD_HOST and EXPERTD_PORT, or 127.0.0.1:8000)")
        command.add_argument("--timeout", type=float, default=3.0, metavar="S", help="seconds to wait (default: 3)")


def run(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Carry one of them out: the server's address and the key are those of `environment`, unless the options say
    otherwise. Returns the exit code. Raises UsageError for what is no address."""
    url = options.url or default_url(environment)
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url: {url!r} is not an address: write http://HOST:PORT")
    key = environment.get(API_KEY_VARIABLE, "").split(",")[0].strip()
    if options.command == "health":
        return _health(url + ("/live" if options.live else "/ready"), options.timeout)
    return _status(url + "/status", key, options)


def default_url(environment: Mapping[str, str]) -> str:
    """Where a server with this environment listens, as seen from this box."""
    host = environment.get(ENV_PREFIX + "HOST", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{environment.get(ENV_PREFIX + 'PORT', '8000')}"


def _health(url: str, timeout_s: float) -> int:
    try:
        body = _get(url, "", timeout_s)
    except OSError as error:
        print(f"expertd: {_why(error)}", file=sys.stderr)
        return NOT_WELL
    print(body["status"])
    return 0


def _status(url: str, key: str, options: argparse.Namespace) -> int:
    before: tuple[float, Any] | None = None
    while True:
        try:
            now, body = time.monotonic(), _get(url, key, options.timeout)
        except OSError as error:
            print(f"expertd: {_why(error)}", file=sys.stderr)
            if options.watch is None:
                return NOT_WELL
        else:
            text = json.dumps(body) if options.json else "\n".join(shown(body, now, before))
            print(text if options.watch is None or options.json else f"\x1b[H\x1b[2J{text}", flush=True)
            before = (now, body)
        if options.watch is None:
            return 0
        time.sleep(options.watch)


def _get(url: str, key: str, timeout_s: float) -> Any:
    """The JSON answer. Raises OSError; HTTPError, which is one, for a status that is not 2xx."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server on this box needs no proxy
    with opener.open(request, timeout=timeout_s) as answer:
        return json.load(answer)


def _why(error: OSError) -> str:
    if not isinstance(error, urllib.error.HTTPError):
        return str(getattr(error, "reason", error))
    with error:
        text = error.read().decode(errors="replace")
    return f"{error.code}: {text}"


def shown(body: Mapping[str, Any], now: float, before: tuple[float, Any] | None) -> list[str]:
    """The lines for people. With an earlier look `before` (time, body), what happens now too."""
    model = body.get("model")
    name = (
        f"{model['name']}, {model['layers']} × {model['experts']} experts in {model['dtype']}" if model else "no model"
    )
    state = body["status"] if "stage" not in body else f"{body['status']}: {body['stage']}, {body['progress']:.0%}"
    has_engine = body["status"] in ("ready", "draining")  # without one there is nothing to measure
    lines = [f"{state}  {name}, up {body['uptime_s']:.0f} s", *_memory(body.get("memory") if has_engine else None)]
    work, experts = body["requests"], body["experts"]
    lines.append(
        f"requests  {work['running']} running, {work['waiting']} waiting, room for {work['capacity']} sequences; "
        f"{body['tokens']['generated']:.0f} tokens generated"
    )
    lines.append(
        f"experts   {experts['hit_ratio']:.1%} hits of {experts['lookups']:.0f} lookups, "
        f"{experts.get('stall_s', 0):.1f} s stalled, {size(experts.get('read_bytes', 0))} read"
    )
    if body["engine"]["last_failure"]:
        lines.append(_engine(body["engine"]))
    if before is not None:
        lines.append(_now(body, now - before[0], before[1]))
    return [*lines, *(f"fallback  {text}" for text in (model or {}).get("fallbacks", ()))]


def _engine(engine: Mapping[str, Any]) -> str:
    last = engine["last_failure"]
    return f"engine    restarts: {engine['restarts']}; {last['ago_s']:.0f} s ago the last one {last['how']}"


def _memory(memory: Mapping[str, Any] | None) -> Sequence[str]:
    if memory is None:
        return ()
    experts, kv, total = memory["experts"], memory["kv"], memory["total"]
    budget = f" of a budget of {size(total['budget'])}" if total["budget"] else ", no memory budget"
    return (
        f"memory    {size(total['used'])}{budget}; highest {size(total['peak'])} ({total['source']})",
        f"budget    experts {size(experts['resident'] + experts['loading'])} of {size(experts['budget'])}, "
        f"all are {size(experts['all'])}",
        f"kv        {size(kv['used'])} used, {size(kv['cached'])} kept for later, of {size(kv['capacity'])}",
    )


def _now(body: Mapping[str, Any], seconds: float, earlier: Mapping[str, Any]) -> str:
    def rate(part: str, name: str) -> float:
        return float(body[part].get(name, 0) - earlier[part].get(name, 0)) / seconds

    lookups = body["experts"]["lookups"] - earlier["experts"]["lookups"]
    hits = body["experts"].get("hit", 0) - earlier["experts"].get("hit", 0)
    ratio = f"{hits / lookups:.0%} hits" if lookups else "no lookups"
    return (
        f"now       {rate('tokens', 'generated'):.1f} tokens/s, {ratio}, {rate('experts', 'stall_s'):.0%} stalled, "
        f"{size(rate('experts', 'read_bytes'))}/s read"
    )


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.{1 if power else 0}f} {_UNITS[power]}"
