"""A server on loopback that speaks as the Hugging Face hub does, as far as stock huggingface_hub asks it to.

Spoken: a model's page (commit, files, sizes), HEAD and GET of files with ETag, X-Repo-Commit and ranges, and the hub's
error codes. It can be told to be busy, to break off in the middle of a file, or to hold less of one than it promises.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and does.

    files: of the one repository, owner/tiny.
    busy: answers (status, Retry-After) that come before anything else, one a request.
    breaks: bytes after which the next GET of a file breaks off.
    vanishes: nothing is answered any more once a file has broken off.
    short: bytes that are held of a file, less than are promised.
    requests: method, path and range of every request that was not answered as busy.
    """

    files: dict[str, bytes]
    url: str = ""
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    busy: list[tuple[int, str | None]] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    vanishes: bool = False
    gone: bool = False
    short: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The files that were sent, in order of their names."""
        place = f"/resolve/{COMMIT}/"
        return sorted(
            path.partition(place)[2] for method, path, _ in self.requests if method == "GET" and place in path
        )

    def ranges(self, name: str) -> list[str | None]:
        """What of a file was asked for, one request after the other; None for the whole."""
        return [place for method, path, place in self.requests if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    """Answer on a free port of 127.0.0.1, whose address `hub.url` then is."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.gone:
            self.close_connection = True
            return
        if self.hub.busy:
            status, wait = self.hub.busy.pop(0)
            self._send(status, {"Retry-After": wait} if wait else {})
            return
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404)

    def _refuse(self, repository: str, revision: str) -> bool:
        if repository != "owner/tiny":
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in (*self.hub.branches, COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return False
        return True

    def _model(self, repository: str, revision: str) -> None:
        if self._refuse(repository, revision):
            return
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.hub.files.items()]
        page = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(page).encode())

    def _file(self, repository: str, revision: str, name: str) -> None:
        if self._refuse(repository, revision):
            return
        if self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"})
            return
        if name not in self.hub.files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = self.hub.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            self._send(200, headers, content)
            return
        held = content[: self.hub.short.get(name, len(content))]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {start}-{len(held) - 1}/{len(held)}"
        self._send(206 if self.headers.get("Range") else 200, headers, held[start:], self.hub.breaks.pop(name, None))

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", break_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # of a client that was killed
                self.wfile.write(body if break_after is None else body[:break_after])
        if break_after is not None:
            self.wfile.flush()
            self.close_connection = True
            self.hub.gone = self.hub.vanishes
