"""A headless Chromium, driven over the Chrome DevTools Protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--window-size=1400,900"),
    *("--remote-debugging-port=0", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]


class Page:
    """One tab; ``requests`` lists the addresses that it asked for."""

    def __init__(self, url: str, patience: float = 60) -> None:
        assert CHROMIUM
        self.patience = patience
        self.requests: list[str] = []
        self._count = 0
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={self._home.name}", "about:blank"]
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        port = Path(self._home.name, "DevToolsActivePort")
        self._until(lambda: port.exists() and "\n" in port.read_text(), "Chromium's port")
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
            tab = next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        self._socket = connect(tab, max_size=None, proxy=None).__enter__()
        for domain in ("Page", "Runtime", "Network"):
            self._send(f"{domain}.enable")
        self._send("Page.navigate", url=url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.__exit__(None, None, None)
        self._process.terminate()
        self._process.wait(10)
        self._home.cleanup()

    def js(self, expression: str) -> Any:
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer)
        return answer["result"].get("value")

    def text(self, css: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(css)})?.innerText ?? ''"))

    def wait(self, condition: str) -> None:
        self._until(lambda: self.js(f"!!({condition})"), condition)

    def wait_for_text(self, css: str, text: str) -> None:
        self._until(lambda: text in self.text(css), f"{text!r} in {css}, which has {self.text(css)!r}")

    def click(self, css: str) -> None:
        self.wait(f"(e => e && !e.disabled && (e.click(), true))(document.querySelector({json.dumps(css)}))")

    def fill(self, css: str, text: str) -> None:
        """Type into a field; leaving it commits a number."""
        self.wait(f"(e => e && (e.focus(), e.select(), true))(document.querySelector({json.dumps(css)}))")
        self._send("Input.insertText", text=text)
        self.js("document.activeElement.blur()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))

    def _until(self, check: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + self.patience
        while not check():
            assert time.monotonic() < end, f"not within {self.patience} s: {what}"
            time.sleep(0.05)

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(self.patience))).get("id") != self._count:
            if answer["method"] == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, (method, params, answer)
        result: dict[str, Any] = answer["result"]
        return result
