"""`--push`, against a stand-in of the Hub's HTTP API on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from commands import COMMAND, table, write_checkpoint


class Hub(ThreadingHTTPServer):
    """Takes a repository and a commit, as the Hub does for files that are not large."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, told: object, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({"id": "someone/extended", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._answer({"error": "You have no right to create a model under this namespace"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/someone/extended", "name": "someone/extended"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            kept = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            self._answer({"files": kept})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            told = {
                "commitUrl": f"{self.server.address}/someone/extended/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
            self._answer(told)
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(folder: Path, out: Path, hub: Hub, name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out.parent / "hub")}
    command = [*COMMAND, "export", str(folder), "-f", str(folder / "factors.json"), "--out", str(out), "--push", name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_an_export_is_uploaded_whole_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    table().save(folder / "factors.json")
    done = push(folder, tmp_path / "out", hub, "someone/extended")
    assert done.returncode == 0, done.stderr
    (asked,) = hub.created
    assert asked["name"] == "extended"
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "factors.json", "model.safetensors", "README.md"} <= set(hub.files)


def test_what_the_hub_refuses_is_one_line_and_the_export_stays(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    table().save(folder / "factors.json")
    hub.refuses = True
    done = push(folder, tmp_path / "out", hub, "someone/extended")
    assert done.returncode == 2
    assert done.stderr.startswith("longrope: --push: got someone/extended, which the Hub does not take; ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out" / "config.json").is_file()
    assert "hf_secret" not in done.stderr
