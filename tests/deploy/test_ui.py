"""The live page in a real browser: it shows what happens, turns the budget, chats, and survives its engine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from expertd_server.auth import KeyRing
from support.browser import Page, open_page
from support.daemon import RunningDaemon, daemon
from support.demo import CACHE, demo_store
from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import write_store
from support.running_server import Server, running

ADMIN = "admin-key"
STATE = "document.getElementById('state').textContent"
MAP = "document.getElementById('map').dataset.experts"
TALK = "[...document.querySelectorAll('#talk .assistant')].at(-1).textContent"


def say(page: Page, text: str) -> None:
    page.evaluate(
        f"document.getElementById('prompt').value = {text!r}; document.getElementById('chat').requestSubmit()"
    )


def set_budget(page: Page, share: float) -> None:
    """Move the slider to this share of its way and apply it with the admin key."""
    page.evaluate(
        "(() => { const s = document.getElementById('slider');"
        f" s.value = +s.min + {share} * (s.max - s.min); s.dispatchEvent(new Event('input'));"
        f" document.getElementById('admin').value = '{ADMIN}';"
        " document.getElementById('budget').requestSubmit(); })()"
    )
    page.until("document.getElementById('said').textContent.startsWith('now ')")


def watch(page: Page) -> None:
    """Let the page note every map and every length of the answer that it ever shows."""
    page.evaluate(
        "window.maps = new Set(); window.lengths = new Set(); setInterval(() => {"
        f" maps.add({MAP}); const last = [...document.querySelectorAll('#talk .assistant')].at(-1);"
        " if (last) lengths.add(last.textContent.length); }, 20); true"
    )


def use(page: Page, restart_engine: Callable[[], None], seen_enough: Callable[[], None] = lambda: None) -> None:
    """Everything that a person would do, in order. `restart_engine` kills it and waits for the next one.

    `seen_enough` is called once the first answer was seen to grow: it need not take its time any longer.
    """
    page.until(f"{STATE} === 'ready'")
    page.until(f"({MAP} || '').length > 0")
    watch(page)
    say(page, "What is the capital of France?")
    page.until("lengths.size >= 4 && maps.size > 1")
    seen_enough()
    page.until("document.getElementById('send').textContent === 'Send'")
    before = page.evaluate("last.s.memory.experts.budget")
    set_budget(page, 0.9)
    page.until(f"last.s.memory.experts.budget > {before}")
    restart_engine()
    page.evaluate("last = null; true")
    page.until(f"last && {STATE} === 'ready'")
    say(page, "And of Italy?")
    page.until(f"{TALK}.length > 0")
    page.until("document.getElementById('send').textContent === 'Send'")


def asked_elsewhere(page: Page, url: str) -> list[str]:
    """What the page fetched that is not the server's own."""
    return [asked for asked in page.requested if urlsplit(asked).scheme != "data" and not asked.startswith(url)]


@pytest.fixture
def hurry() -> threading.Event:
    """Set, the server's engines no longer take their time."""
    return threading.Event()


@pytest.fixture
def server(tmp_path: Path, hurry: threading.Event) -> Iterator[Server]:
    """Its engines take their time: a page that looks three times a second is to see them at work."""
    over = threading.Event()

    def pace(server: Server) -> None:
        while not over.wait(0.001 if hurry.is_set() else 0.04):
            server.engine.allow(1)

    with running(write_store(tmp_path / "store")) as start:
        script = Script(info=engine_info(max_model_len=4096), answer=b"Paris, of course. " * 24, held=True)
        made = start(script, keys=KeyRing.of(admin=[ADMIN]))
        pacing = threading.Thread(target=pace, args=(made,))
        pacing.start()
        yield made
        over.set()
        pacing.join()


def test_the_page_lives(server: Server, hurry: threading.Event, tmp_path: Path) -> None:
    def restart() -> None:
        server.engine.crash()
        server.launcher.wait_for_engine(2)
        server.until_ready()

    with open_page(tmp_path / "browser", server.url + "/ui") as page:
        use(page, restart, hurry.set)
        assert not page.complaints and not asked_elsewhere(page, server.url)


def test_the_page_fits_a_phone(server: Server, tmp_path: Path) -> None:
    with open_page(tmp_path / "browser", server.url + "/ui") as page:
        page.size(360, 740)
        page.until(f"{STATE} === 'ready'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        narrow = page.evaluate("[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().width)")
        assert min(narrow) > 300, "sections stand one below the other"


@pytest.mark.acceptance
def test_the_page_lives_with_a_real_model(tmp_path: Path) -> None:
    """Set UI_SCREENSHOT to a path to keep a picture of it at work."""
    demo_store("bf16")
    (tmp_path / "admin").write_text(ADMIN)
    flags = ("--expert-budget", "40%", "--max-model-len", "1024", "--cache-dir", str(CACHE))
    with (
        daemon("demo", *flags, "--admin-key-file", str(tmp_path / "admin")) as running_daemon,
        open_page(tmp_path / "browser", running_daemon.url + "/ui") as page,
    ):
        page.size(1200, 900)
        if picture := os.environ.get("UI_SCREENSHOT"):
            _pose(page, Path(picture))
        use(page, lambda: _restart(running_daemon))
        assert not page.complaints and not asked_elsewhere(page, running_daemon.url)


def _restart(running_daemon: RunningDaemon) -> None:
    os.kill(running_daemon.engine_pid(), signal.SIGKILL)
    while running_daemon.metrics()["expertd_engine_restarts_total"] < 1:
        time.sleep(0.1)
    running_daemon.until_ready()


def _pose(page: Page, picture: Path) -> None:
    page.until(f"{STATE} === 'ready'")
    say(page, "Tell me a story about a mixture of experts.")
    page.until("trend.length > 8 && document.querySelector('#talk .assistant').textContent.length > 200")
    page.screenshot(picture)
    page.evaluate("document.getElementById('chat').requestSubmit()")
    page.until("document.getElementById('send').textContent === 'Send'")
