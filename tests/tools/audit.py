"""`make audit`: are known vulnerabilities recorded for what is installed? Asks PyPI, package by package.

    python tests/tools/audit.py [--ignore ID …]

Exit code 1 where there are. Where PyPI does not answer, or answers without knowing of a vulnerability that everybody
knows (a mirror does), nothing was audited: that is said loudly, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from typing import Any

CANARY = ("jinja2", "3.1.2")
"""A release whose vulnerabilities (GHSA-h5c8-rqwp-cp95 and others) any source that is worth asking knows."""

TIMEOUT_S = 10.0

Fetch = Callable[[str, str], list[dict[str, Any]] | None]
"""Known vulnerabilities of a package's version; None where the source does not know the package. Raises OSError."""


class NoSource(Exception):
    """Nobody answered who could know."""


def fetch_from_pypi(name: str, version: str) -> list[dict[str, Any]] | None:
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/{name}/{version}/json", timeout=TIMEOUT_S) as answer:
            vulnerabilities: list[dict[str, Any]] = json.load(answer).get("vulnerabilities", [])
            return [one for one in vulnerabilities if not one.get("withdrawn")]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def installed() -> list[tuple[str, str]]:
    """All packages of this environment but ours, with public versions: `2.13.0+cpu` is `2.13.0`."""
    found = {(d.metadata["Name"].lower(), d.version.partition("+")[0]) for d in distributions()}
    return sorted((name, version) for name, version in found if name != "expertd")


def audit(packages: Iterable[tuple[str, str]], fetch: Fetch, ignored: frozenset[str] = frozenset()) -> list[str]:
    """A line for each vulnerability. Raises NoSource."""
    try:
        if not fetch(*CANARY):
            raise NoSource(f"the source knows nothing of {CANARY[0]} {CANARY[1]}, which is known to be vulnerable")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda package: (package, fetch(*package)), packages))
    except OSError as error:
        raise NoSource(str(error)) from error
    return [
        f"{name} {version}: {one['id']}: {one.get('summary') or one.get('details', '')[:100]} "
        f"(fixed in {', '.join(one.get('fixed_in', [])) or 'no release'})"
        for (name, version), known in answers
        for one in known or ()
        if one["id"] not in ignored
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="audit")
    parser.add_argument("--ignore", action="append", default=[], help="a vulnerability that does not concern us")
    options = parser.parse_args()
    packages = installed()
    try:
        found = audit(packages, fetch_from_pypi, frozenset(options.ignore))
    except NoSource as error:
        print(f"*** DEPENDENCIES WERE NOT AUDITED: {error} ***", file=sys.stderr)
        return 0
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(packages)} packages audited, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
