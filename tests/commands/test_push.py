"""export --push against a hub on this machine, in processes of their own: the hub's library reads its settings once."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and a commit of small files; remembers what came."""

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"name": "me", "type": "user"}, 200 if self.headers.get("Authorization") == "Bearer hf_good" else 401)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen[self.path] = body.decode()
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            done = {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/mine/commit/0"}
            self.answer(done if self.server.open else {"error": "closed"}, 200 if self.server.open else 403)
        else:
            self.answer({"url": "http://127.0.0.1/me/mine", "name": "me/mine", "id": "1"})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.open = {}, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(tmp_path, server=None, **environment):
    """What is said when a folder of one file is pushed; where the last exception stands, its message."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "README.md").write_text("# mine")
    code = "from pathlib import Path\nfrom zs_lightning.commands.export.command import check_login, push\n"
    code += f"check_login('me/mine')\npush('me/mine', Path({str(tmp_path / 'model')!r}))"
    port = server.server_port if server else 9
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
    clean = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=clean | settings | environment, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    return ended.stdout + ended.stderr


def test_a_folder_is_uploaded_to_a_private_repository(tmp_path, hub):
    assert push(tmp_path, hub, HF_TOKEN="hf_good") == "Uploaded: me/mine\n"
    assert json.loads(hub.seen["/api/repos/create"])["visibility"] == "private"
    assert '"path": "README.md"' in hub.seen["/api/models/me/mine/commit/main"]


def test_a_failed_upload_says_how_to_go_on(tmp_path, hub):
    hub.open = False
    said = push(tmp_path, hub, HF_TOKEN="hf_good").splitlines()[-1]
    assert said.startswith(f"zs_lightning.errors.RunError: --push: {tmp_path / 'model'} is complete, but its upload failed: ")
    assert said.endswith(f"go on with hf upload me/mine {tmp_path / 'model'}")


def test_push_needs_a_login_and_a_hub(tmp_path, hub):
    assert "you are not logged in; run hf auth login" in push(tmp_path, hub)
    assert "HF_HUB_OFFLINE forbids it" in push(tmp_path, hub, HF_TOKEN="hf_good", HF_HUB_OFFLINE="1")
    assert "UserError: --push me/mine: the hub does not let you in" in push(tmp_path, hub, HF_TOKEN="hf_bad")
    assert "UserError: --push me/mine: the hub does not let you in" in push(tmp_path, HF_TOKEN="hf_good")
    assert hub.seen == {}
