"""A headless Chromium, spoken to through the DevTools protocol over two pipes: what a page logs, asks for and shows."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMMAND = (
    "--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 120


@dataclass
class Browser:
    """One tab."""

    to: int
    back: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytes = b""
    _number: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file with the network off."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        before = self._loaded
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._loaded == before:
            self._receive()

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self) -> Image.Image:
        """The whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the page wrote to the console, whatever its level, and what it threw."""
        wrong = (
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening",
        )
        return [event for event in self.events if event["method"] in wrong]

    @property
    def asked_for(self) -> list[str]:
        """The addresses that it loaded, but for those that hold their own content."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def _loaded(self) -> int:
        return sum(event["method"] == "Page.loadEventFired" for event in self.events)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            received = os.read(self.back, 1 << 20)
            assert received, "the browser has gone"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A tab of a browser of its own, whose network is off."""
    assert CHROMIUM is not None
    (to_read, to_write), (back_read, back_write) = os.pipe(), os.pipe()
    # The protocol's pipes are descriptors 3 and 4, whatever their numbers are here.
    script = f'exec "$@" 3<&{to_read} 4>&{back_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", CHROMIUM, *COMMAND, f"--user-data-dir={profile}"],
        pass_fds=(to_read, back_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(back_write)
    try:
        here = Browser(to_write, back_read)
        target = here.call("Target.createTarget", url="about:blank")["targetId"]
        here.session = here.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Log", "Runtime", "Network", "Page"):
            here.call(f"{domain}.enable")
        here.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        yield here
    finally:
        process.terminate()
        process.wait()
        os.close(to_write)
        os.close(back_read)
