"""Headless Chromium, driven through chromedriver in the W3C WebDriver protocol: HTTP and JSON."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 90.0  # seconds for a page to show what is waited for


class Browser:
    """One window."""

    def __init__(self, address: str, session: str, log: Path) -> None:
        self._root, self._log = f"{address}/session/{session}", log

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._root}/{path}", data)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Go to a page."""
        self._ask("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; ``return`` gives a value."""
        return self._ask("execute/sync", {"script": script, "args": list(arguments)})

    @property
    def text(self) -> str:
        """What a person can read."""
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def wait_for(self, *words: str) -> str:
        """Wait until all the words can be read, and return the text of the page."""
        end = time.monotonic() + PATIENCE
        while True:
            text = self.text
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < end, f"{missing} cannot be read in:\n{text}"
            time.sleep(0.3)

    def wait_until(self, script: str, what: str) -> Any:
        """Wait until JavaScript gives something true, and return it."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{what}; the page says:\n{self.text}"
            time.sleep(0.3)
        return value

    def picture(self, file: Path) -> bytes:
        """Keep what is seen as a PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self._ask("screenshot")))
        return file.read_bytes()

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """Turn the network of this window off, for a while."""
        conditions = {"latency": 0, "throughput": -1, "offline": True}
        self._ask("chromium/network_conditions", {"network_conditions": conditions})
        try:
            yield
        finally:
            conditions = {**conditions, "offline": False}
            self._ask("chromium/network_conditions", {"network_conditions": conditions})

    def click(self, selector: str) -> None:
        """Click on what is there, as a person does."""
        self.wait_until(f"return !!document.querySelector({json.dumps(selector)})", "it is absent")
        found = self._ask("element", {"using": "css selector", "value": selector})
        self._ask(f"element/{next(iter(found.values()))}/click", {})

    def enter(self, selector: str) -> None:
        """Go into a frame of the page."""
        found = self._ask("element", {"using": "css selector", "value": selector})
        self._ask("frame", {"id": found})

    def leave(self) -> None:
        """Go back to the page."""
        self._ask("frame", {"id": None})

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse there."""
        steps = [
            {"type": "pointerMove", "duration": 50, "x": round(x) + shift, "y": round(y)}
            for shift in (3, 0)
        ]
        mouse = {"type": "pointer", "id": "mouse", "actions": steps}
        self._ask("actions", {"actions": [mouse | {"parameters": {"pointerType": "mouse"}}]})

    def complaints(self) -> list[str]:
        """What the browser's console has said of errors since it was last asked."""
        entries = self._ask("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 1000) -> Iterator[Browser]:
    """A window with a fresh profile; skips where Chromium or its driver is not installed."""
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    process = subprocess.Popen(
        [driver, f"--port={port}", f"--log-path={folder / 'driver.log'}"],
        env={**os.environ, "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    options = {"args": flags, "binary": chromium}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "SEVERE"}}
    try:
        _wait_for_driver(address)
        body = json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode()
        request = urllib.request.Request(f"{address}/session", body)
        with urllib.request.urlopen(request, timeout=120) as answer:
            session = json.load(answer)["value"]["sessionId"]
        yield Browser(address, session, folder / "driver.log")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_driver(address: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/status", timeout=5).close()
            return
        assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.1)
