"""A small Hub on loopback: enough of the Hub's API for huggingface_hub to list, download and commit.

Written from huggingface_hub's own requests and the Hub's documentation. What it does wrong, a test asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has and does; change it between requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    repo: str = "org/repo"
    revisions: tuple[str, ...] = ("main", "v1.0", COMMIT)
    gated: int = 0
    """The status that a gated repository answers with."""
    private: bool = False
    """Whether a token is needed."""
    cdn: str = ""
    """Another host, to which large files redirect."""
    break_after: int | None = None
    """Bytes of a large file after which the connection ends, once for each request."""
    altered: bool = False
    """Whether the bytes that come are others than stated."""
    is_cdn: bool = False
    url: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)

    def seen(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers, in lower case, of the requests whose path holds ``part``."""
        return [headers for verb, path, headers in self.requests if verb == method and part in path]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """``hub`` at a free port of 127.0.0.1."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _is_large(name: str) -> bool:
    return name.endswith(".gguf")


def _git_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing: tests are quiet."""

    def _begin(self) -> str:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.state.requests.append((self.command, self.path, headers))
        return self.path.partition("?")[0]

    def do_HEAD(self) -> None:
        self._resolve(self._begin())

    def do_GET(self) -> None:
        path = self._begin()
        match = re.fullmatch(rf"/api/models/{self.state.repo}(?:/revision/(.+))?", path)
        if match:
            self._info(match[1] or "main")
        else:
            self._resolve(path)

    def do_POST(self) -> None:
        path = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path.endswith("/objects/batch"):
            self._batch(json.loads(body))
        elif self._refuse("main"):
            return
        elif path == "/api/repos/create":
            self._json(200, {"url": f"{self.state.url}/{self.state.repo}"})
        elif "/preupload/" in path:
            self._json(200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._json(200, {})

    def do_PUT(self) -> None:
        path = self._begin()
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        self.state.uploads[path.rpartition("/")[2]] = data
        self._json(200, {})

    # ---- answers -----------------------------------------------------------------------------------------

    def _json(self, status: int, value: Any, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, revision: str) -> bool:
        state = self.state
        if state.gated:
            self._json(state.gated, {"error": "gated"}, X_Error_Code="GatedRepo")
        elif state.private and self.headers.get("Authorization") != "Bearer hf_right":
            self._json(401, {"error": "no"}, X_Error_Code="RepoNotFound")
        elif revision not in state.revisions:
            self._json(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def _info(self, revision: str) -> None:
        if self._refuse(revision):
            return
        siblings = []
        for name, data in self.state.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_id(data)}
            if _is_large(name):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        info = {
            "id": self.state.repo,
            "modelId": self.state.repo,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
        }
        self._json(200, info)

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(rf"/{self.state.repo}/resolve/([^/]+)/(.+)", path)
        if match is None:
            self._json(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return
        revision, name = match[1], match[2]
        if not self.state.is_cdn and self._refuse(revision):
            return
        if name not in self.state.files:
            self._json(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            return
        data = self.state.files[name]
        etag = hashlib.sha256(data).hexdigest() if _is_large(name) else _git_id(data)
        if self.state.cdn and _is_large(name):
            self.send_response(302)
            self.send_header("Location", f"{self.state.cdn}{path}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(data, etag, _is_large(name))

    def _send(self, data: bytes, etag: str, large: bool) -> None:
        if self.state.altered and large:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.send_response(206 if asked else 200)
        if asked:
            begin = int(asked[1])
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.state.break_after if large else None
        self.wfile.write(data[begin:] if limit is None else data[begin : begin + limit])
        if limit is not None:
            self.close_connection = True

    # ---- uploads -----------------------------------------------------------------------------------------

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if _is_large(name) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, request: dict[str, Any]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.state.url}/upload/{entry['oid']}"}}}
            for entry in request["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        self.state.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.state.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.state.files[value["path"]] = self.state.uploads[value["oid"]]
        self._json(
            200,
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.state.url}/{self.state.repo}/commit/{COMMIT}",
                "hookOutput": "",
            },
        )
