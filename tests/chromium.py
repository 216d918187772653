"""A headless Chromium that tests drive over its DevTools protocol."""

import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import websocket

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --remote-debugging-port=0
--hide-scrollbars --remote-allow-origins=*""".split()
PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page:
    """One tab. problems: errors that pages wrote to the console or threw."""

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.number, self.problems, self.loaded = 0, [], False
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict:
        message = json.loads(self.socket.recv())
        given = message.get("params", {})
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(given["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.problems.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        return message

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := self.receive()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self.receive()

    def run(self, script: str):
        """The value of JavaScript, awaited."""
        how = {"returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def drag(self, start, end) -> None:
        """Press the mouse at one point of the window, move to another, let go."""
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            how = {"x": x, "y": y, "button": "left", "buttons": int(kind != "Released")}
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", clickCount=1, **how)

    def window(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)


@contextmanager
def chromium(folder: Path):
    """A `Page` of a browser whose profile lies in a new folder."""
    process = subprocess.Popen(
        [PROGRAM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        port, patience = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            assert time.monotonic() < patience, "the browser did not start"
            time.sleep(0.1)
        listed = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
        tabs = json.load(urllib.request.urlopen(listed, timeout=60))
        page = Page(next(one["webSocketDebuggerUrl"] for one in tabs if one["type"] == "page"))
        yield page
        page.socket.close()
    finally:
        process.terminate()
        process.wait()
