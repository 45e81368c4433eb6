"""A headless Chromium, driven by its own protocol over one websocket: enough to use a page and to hear it complain."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

WAIT_S = 300.0


class Page:
    """One tab. Events are taken in whenever it is spoken to."""

    def __init__(self, socket: ClientConnection) -> None:
        self.complaints: list[str] = []
        """Errors on the console, and exceptions that nobody caught."""
        self.requested: list[str] = []
        """Every address asked for."""
        self._socket = socket
        self._ids = itertools.count(1)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a protocol command. Raises AssertionError where the browser refuses it."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._hear(message)

    def _hear(self, event: Any) -> None:
        method, what = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(what["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(what["exceptionDetails"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.complaints.append(f"{what['entry']['text']} {what['entry'].get('url')}")
        elif method == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.complaints.append(json.dumps(what["args"]))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """The first true value of an expression. Raises AssertionError after `WAIT_S`."""
        end_s = time.monotonic() + WAIT_S
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end_s, f"never true: {script}; {self.complaints}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_page(folder: Path, url: str) -> Iterator[Page]:
    """`url` in a browser of its own, which keeps its things in `folder`; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    process = subprocess.Popen(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "DevTools listening" in line), "")
        port = re.search(r"ws://[^:]+:(\d+)/", line)
        assert port is not None, "Chromium did not start"
        # Without keepalive: a browser on a busy box may be silent for longer than its 20 seconds.
        with connect(_first_tab(int(port[1])), max_size=None, ping_interval=None) as socket:
            page = Page(socket)
            page.call("Page.navigate", url=url)
            page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
            yield page
    except ConnectionClosed as error:
        raise AssertionError(f"the browser went away: {error}") from error
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _first_tab(port: int) -> str:
    tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_S).json()
    return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
