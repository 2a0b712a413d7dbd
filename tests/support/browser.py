"""A real browser, if there is one on this machine, driven through the pipes of its own protocol."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

NAME = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One page. What it says and asks of the network is kept in `said` and `asked`."""

    def __init__(self, folder):
        command, (self.answers, theirs) = [NAME, *FLAGS, f"--user-data-dir={folder}", "about:blank"], os.pipe()
        mine, self.orders = os.pipe()
        # The protocol's pipes are the process's numbers 3 and 4, so these must be others.
        far = [fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (mine, theirs)]
        shell = f'exec "$@" 3<&{far[0]} 4>&{far[1]}'
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", shell, "-", *command], pass_fds=far, **quiet)
        for number in (mine, theirs, *far):
            os.close(number)
        self.rest, self.number, self.session, self.said, self.asked = b"", 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """The result of a command."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": parameters}
        order |= {"sessionId": self.session} if self.session else {}
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self):
        """The next message."""
        while b"\0" not in self.rest:
            got = os.read(self.answers, 1 << 20)
            assert got, "the browser has ended"
            self.rest += got
        message, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(message)
        if message.get("method") in (
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Page.javascriptDialogOpening",
        ):
            self.said.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])
        return message

    def run(self, script):
        """What a script on the page returns."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, wait="document.documentElement?.dataset.ready", fragment=""):
        """Loads a file and waits until the script is true; returns its value."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"file://{path}{fragment}")
        return self.wait(wait)

    def wait(self, script, seconds=60):
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, (script, self.said)
            time.sleep(0.02)
        return found

    def look(self, width, height, dark=False):
        """Sets the size of the window and the user's colours."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=media)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.orders)
        os.close(self.answers)
