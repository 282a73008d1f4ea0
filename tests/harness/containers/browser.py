"""Chromium without a window, in a container, driven by the DevTools protocol over a pair of pipes.

Nothing but the standard library is needed for that: `--remote-debugging-pipe` takes JSON messages, each with a zero
byte behind it, from descriptor 3, and writes answers and events to descriptor 4 (content/public/browser/
devtools_agent_host.h; the protocol: chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import base64
import itertools
import json
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.harness.containers.container import Container

PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")
PROGRAM = "chromium-headless-shell"

SECONDS = 60.0
"""How long one answer may take, and what a page is waited for."""
SIZE, PHONE = (1280, 1600), (380, 800)
"""Width and height, in pixels of CSS."""

_OPTIONS = (
    "--remote-debugging-pipe",
    # It is root, in a container, and sees pages of ours only.
    "--no-sandbox",
    # What is shared is in /tmp: /dev has no folder for it.
    "--disable-dev-shm-usage",
    "--disable-gpu",
    # No request of its own.
    "--disable-background-networking",
    "--no-first-run",
    "--lang=en",
)
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")

_profiles = itertools.count(1)

_UNTIL = """new Promise(done => {
    const look = () => { const found = (() => (%s))(); found ? done(found) : requestAnimationFrame(look) };
    look();
})"""


class PageError(AssertionError):
    """The page has no such thing, or its script failed."""


class Browser:
    """One page, which keeps what was requested and what was said on its console. It ends with the container."""

    def __init__(self, machine: Container) -> None:
        profile = f"--user-data-dir=/tmp/browser-{next(_profiles)}"
        enter = ("nsenter", f"--target={machine.pid}", *_NAMESPACES)
        pipes = ("sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>/run/browser.log', "sh")
        self._process = subprocess.Popen(
            [*enter, *pipes, "env", "HOME=/tmp", PROGRAM, *_OPTIONS, profile, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._received = bytearray()
        self._numbers = itertools.count(1)
        self._contexts: dict[str, int] = {}
        """Where scripts of a frame run, by the frame's id."""
        self._frames: dict[int, str] = {}
        """The same the other way round."""
        self._addresses: dict[str, str] = {}
        """What is in each frame."""
        self.console: list[tuple[str, str]] = []
        """Errors and warnings, exceptions included, and what a policy has kept from a page.

        Each with the address that it is about: of the page, or of what that asked for.
        """
        self.requests: list[str] = []
        """The addresses of all that the page asked for."""
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session: str = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(*SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It ends when nobody is at the other end of its pipes."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    # The page -------------------------------------------------------------------------------------------------------

    def open(self, address: str) -> None:
        self.call("Page.navigate", {"url": address})

    def run(self, script: str, frame: str = "") -> Any:
        """The value of an expression; of a promise, what that is kept with. PageError: it raised an error.

        It runs in the page itself, or in its frame of that name.
        """
        words = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        if frame:
            children = self.call("Page.getFrameTree")["frameTree"]["childFrames"]
            [found] = [each["frame"]["id"] for each in children if each["frame"].get("name") == frame]
            words["contextId"] = self._contexts[found]
        done = self.call("Runtime.evaluate", words)
        if "exceptionDetails" in done:
            thrown = done["exceptionDetails"]
            raise PageError(f"{script}: {thrown.get('exception', {}).get('description', thrown['text'])}")
        return done["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until an expression is true, and give its value. It may be that of the next page."""
        while True:
            try:
                return self.run(_UNTIL % condition)
            except PageError as error:
                if "context was destroyed" not in str(error) and "navigated or closed" not in str(error):
                    raise

    def press(self, key: str, code: int) -> None:
        """A key on the keyboard, with the number that Windows has for it."""
        words: dict[str, object] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        if key == "Enter":
            words["text"] = "\r"
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", {"type": kind, **words})

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", {"text": text})

    def click(self, where: str) -> None:
        """Click on it, once it is there."""
        self.until(f"document.querySelector({json.dumps(where)})?.checkVisibility()")
        self.run(f"document.querySelector({json.dumps(where)}).click()")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Colours: `light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def download_to(self, folder: str) -> None:
        """Keep what is downloaded there, in the container."""
        self._call("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": folder}, None)

    def screenshot(self, file: Path) -> None:
        """As its suffix says: .png, or .webp, which is smaller and not exact."""
        words = {"format": "webp", "quality": 60} if file.suffix == ".webp" else {"format": "png"}
        data = self.call("Page.captureScreenshot", words)["data"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(data))

    # The protocol ---------------------------------------------------------------------------------------------------

    def call(self, method: str, parameters: Mapping[str, object] | None = None) -> dict[str, Any]:
        """What a method of the protocol answers for the page. PageError: it is refused."""
        return self._call(method, parameters or {}, self._session)

    def _call(self, method: str, parameters: Mapping[str, object], session: str | None) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._pipe(self._process.stdin).write(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while (answer := self._receive(deadline)).get("id") != number:
            self._event(answer)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, deadline: float) -> dict[str, Any]:
        pipe = self._pipe(self._process.stdout)
        while (end := self._received.find(b"\0")) < 0:
            if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has not answered in {SECONDS:g} s; its console: {self.console}")
            if not (data := pipe.read(1 << 20)):
                raise PageError("the browser has ended; the container's /run/browser.log says why")
            self._received += data
        message: dict[str, Any] = json.loads(self._received[:end])
        del self._received[: end + 1]
        return message

    def _event(self, message: Mapping[str, Any]) -> None:
        about = message.get("params", {})
        match message.get("method"):
            case "Page.frameNavigated":
                self._addresses[about["frame"]["id"]] = about["frame"]["url"]
            case "Runtime.executionContextCreated" if about["context"]["auxData"]["isDefault"]:
                frame, context = about["context"]["auxData"]["frameId"], about["context"]["id"]
                self._contexts[frame] = context
                self._frames[context] = frame
            case "Runtime.consoleAPICalled" if about["type"] in {"error", "warning", "assert"}:
                words = (str(each.get("value", each.get("description"))) for each in about["args"])
                self._said(" ".join(words), about["executionContextId"])
            case "Runtime.exceptionThrown":
                thrown = about["exceptionDetails"]
                text = thrown.get("exception", {}).get("description", thrown["text"])
                self._said(text, thrown.get("executionContextId", 0))
            case "Log.entryAdded" if about["entry"]["level"] in {"error", "warning"}:
                self.console.append((about["entry"]["text"], about["entry"].get("url", "")))
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(about["url"])

    def _said(self, text: str, context: int) -> None:
        self.console.append((text, self._addresses.get(self._frames.get(context, ""), "")))

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe
