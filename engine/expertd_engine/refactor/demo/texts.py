"""Gathers the demo's training texts: one folder of plain text per domain, out of Debian packages. Owns the recipe only.

`python -m expertd_engine.refactor.demo.texts OUT` on a Debian or Ubuntu box with a mirror; no root needed. Versions
follow the mirror, so that figures repeat closely, not bit for bit.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from gettext import GNUTranslations
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

from expertd_engine.console import run_command
from expertd_engine.errors import ResourceError


@dataclass(frozen=True, slots=True)
class Domain:
    """Files of some packages whose paths match `files`, read by `read`; at most `max_bytes` of text are kept."""

    packages: tuple[str, ...]
    licences: str
    files: str
    read: Callable[[bytes], str]
    max_bytes: int = 24_000_000


_HIDDEN = frozenset({"script", "style", "head", "nav", "header", "aside", "footer"})


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        if tag in ("p", "h1", "h2", "h3", "li", "pre"):
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _plain(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _html(data: bytes) -> str:
    parser = _TextOfHtml()
    parser.feed(_plain(data))
    paragraphs = "".join(parser.pieces).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


_ESCAPES = {
    "\\-": "-", "\\e": "\\", "\\(aq": "'", "\\(cq": "'", "\\(lq": '"', "\\(rq": '"', "\\(bu": "*", "\\(em": "–",
    "\\(at": "@", "\\(ti": "~", "\\(ha": "^", "\\ ": " ",
}  # fmt: skip


def _manual(data: bytes) -> str:
    """A manual page without its markup: requests lose their names, escapes become what they print."""
    lines = []
    for line in _plain(data).split("\n"):
        if line.startswith(('.\\"', "'\\\"", ".de", ".ie", ".el", ".if", ".nr", ".ds", ".tr")):
            continue
        if line.startswith("."):
            name, _, rest = line[1:].partition(" ")
            line = ("\n" if name in ("SH", "SS", "TP", "PP", "P", "IP", "LP", "Pp", "It") else "") + rest.replace(
                '"', ""
            )
        lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\[&%/,|^:]|\\s[-+]?\d", "", "\n".join(lines))
    for escape, printed in _ESCAPES.items():
        text = text.replace(escape, printed)
    return re.sub(r"\n{3,}", "\n\n", text)


def _entries(data: bytes) -> str:
    """A dictionary's entries without the mark of its edition that follows each."""
    return re.sub(r"\s*\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet [\d.]+)[^\]\n]*\]", "", _plain(data))


def _catalogue(data: bytes) -> str:
    """The translations of a gettext catalogue, a paragraph each, without keys for the keyboard."""
    found = vars(GNUTranslations(BytesIO(data)))["_catalog"]
    return "\n\n".join(one.replace("_", "").replace("~", "") for key, one in sorted(found.items(), key=str) if key)


def _page(data: bytes) -> str:
    """A page of HTML or Mallard, a message catalogue, or a manual page."""
    if data.startswith(b"\xde\x12\x04\x95"):
        return _catalogue(data)
    marked = any(tag in data[:2000].lower() for tag in (b"<html", b"<page"))
    return _html(data) if marked else _manual(data)


LANGUAGES = {
    "finnish": "fi", "french": "fr", "hungarian": "hu", "japanese": "ja", "polish": "pl", "russian": "ru",
    "spanish": "es", "turkish": "tr",
}  # fmt: skip
"""Languages that the dense model knows little of: what the branched runs teach besides the other domains."""

FURTHER_LANGUAGES = {"chinese": "zh-cn", "czech": "cs", "dutch": "nl", "greek": "el", "korean": "ko"}
"""What the further runs teach besides, for more domains that differ."""

_WITH_MANUALS_OF_CALLS = frozenset({"fr", "ja", "pl", "ru", "es"})
_WITHOUT_MANUALS = frozenset({"ko"})


def _language(code: str) -> Domain:
    """An office suite's help and messages, a desktop's help and manual pages in one language."""
    plain, _, country = code.partition("-")
    packages = [f"libreoffice-help-{code}", f"libreoffice-l10n-{code}", "gnome-user-docs"]
    packages += [f"manpages-{plain}"] if plain not in _WITHOUT_MANUALS else []
    packages += [f"manpages-{code}-dev"] if code in _WITH_MANUALS_OF_CALLS else []
    place = rf"{plain}([-_]{country.upper()})" if country else plain
    return Domain(
        tuple(packages),
        "MPL-2.0, LGPL-3.0-or-later and Apache-2.0; CC-BY-3.0; manuals GPL-3.0-or-later and others, page by page",
        rf"(help/{place}/.*\.(html|page)|resource/{place}/.*\.mo|man/{place}/man\d/.*\.gz)$",
        _page,
    )


DOMAINS: dict[str, Domain] = {
    "kernel-docs": Domain(("linux-doc-6.1",), "GPL-2.0-only", r"_sources/.*\.txt$", _plain),
    "c-headers": Domain(
        ("linux-headers-common", "linux-libc-dev", "libglib2.0-dev", "libssl-dev"),
        "GPL-2.0-only, LGPL-2.1-or-later, Apache-2.0",
        r"include/.*\.h$",
        _plain,
    ),
    "python": Domain(
        ("libpython3-stdlib", "python3-django", "python3-sympy", "python3-twisted", "python3-networkx"),
        "PSF-2.0, BSD-3-Clause, MIT",
        r"\.py$",
        _plain,
    ),
    "dictionary": Domain(("dict-gcide",), "GPL-3.0-or-later", r"gcide\.dict\.dz$", _entries),
    "prose": Domain(
        ("anarchism", "jargon-text", "fortunes"),
        "GPL-2.0-or-later and GFDL-1.1-or-later; public domain; BSD",
        r"(html/.*\.html|jargon\.txt\.gz|games/fortunes/[a-z-]+)$",
        lambda data: _html(data) if b"<html" in data[:2000].lower() else _plain(data),
    ),
    "manuals": Domain(
        ("manpages", "manpages-dev", "git-man", "systemd", "util-linux", "perl-doc", "linux-perf", "mount", "bash"),
        "GPL-2.0-or-later, LGPL-2.1-or-later, Artistic, BSD and others, page by page",
        r"(man/man\d/.*\.gz|\.pod)$",
        _manual,
    ),
    "german": Domain(
        ("manpages-de", "debian-handbook"),
        "GPL-3.0-or-later and others, page by page; CC-BY-SA-3.0 or GPL-2.0-or-later",
        r"(man/de/man\d/.*\.gz|de-DE/.*\.html)$",
        _page,
    ),
    **{name: _language(code) for name, code in (LANGUAGES | FURTHER_LANGUAGES).items()},
}
"""All but the domain `chat`, which is what the dense model itself answers to prompts."""

_PARAGRAPH_BYTES = 120


def gather(destination: Path) -> None:
    """Write `destination/DOMAIN/NUMBER.txt`. Every paragraph of at least 120 characters stands once in all domains, so
    that licence headers and copied passages do not make held-out text easy. Raises ResourceError naming a package that
    cannot be fetched.
    """
    seen: set[bytes] = set()
    for name, domain in DOMAINS.items():
        folder = destination / name
        folder.mkdir(parents=True, exist_ok=True)
        kept = 0
        for number, text in enumerate(_texts(domain)):
            text = _without_repetition(text, seen)
            if len(text) > 400 and kept < domain.max_bytes:
                kept += len(text)
                (folder / f"{number:05}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {kept} characters; licences: {domain.licences}")


def _texts(domain: Domain) -> Iterator[str]:
    """The domain's files, cut where a file is very long, in an order that is the same everywhere and mixes packages."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for package in domain.packages:
            _unpack(package, root)
        paths = [path for path in root.rglob("*") if path.is_file() and re.search(domain.files, str(path))]
        for path in sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()):
            data = path.read_bytes()
            text = domain.read(gzip.decompress(data) if path.suffix in (".gz", ".dz") else data)
            yield from _cut(text, 100_000)


def _unpack(package: str, root: Path) -> None:
    if package == "linux-headers-common":
        package = _newest_headers()
    if package == "libpython3-stdlib":
        package = _depends(package)
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            ["apt-get", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ResourceError(f"cannot fetch the Debian package {package}: {done.stderr.strip().splitlines()[-1]}")
        for archive in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)


def _newest_headers() -> str:
    found = subprocess.run(
        ["apt-cache", "search", "--names-only", r"^linux-headers-[0-9.-]+-common$"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = sorted(line.split()[0] for line in found.stdout.splitlines())
    if not names:
        raise ResourceError("no package linux-headers-*-common on this mirror")
    return names[-1]


def _depends(package: str) -> str:
    found = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=True)
    names = re.findall(r"Depends: (libpython3\.\d+-stdlib)", found.stdout)
    if not names:
        raise ResourceError(f"the Debian package {package} depends on no libpython3.*-stdlib")
    return str(names[0])


def _cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters that end with a paragraph."""
    while len(text) > size:
        end = text.find("\n\n", size)
        if end < 0:
            break
        yield text[:end]
        text = text[end + 2 :]
    yield text


def _without_repetition(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= _PARAGRAPH_BYTES:
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expertd_engine.refactor.demo.texts", description=__doc__)
    parser.add_argument("destination", type=Path, help="folder for one folder per domain")
    options = parser.parse_args(argv)
    return run_command(lambda: gather(options.destination))


if __name__ == "__main__":
    raise SystemExit(main())
