"""A stand-in for the parts of the Hugging Face hub that reading a data set needs, on loopback."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class HubServer:
    """Serves the files of `folder` as revision `main` of the data set `repo`; `token` is asked for if it is set."""

    def __init__(self, repo: str, folder: Path, token: str | None = None) -> None:
        outer = self
        self.repo, self.folder, self.token = repo, folder, token
        self.unknown: list[str] = []
        self.reads = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                outer.answer(self)

            def do_POST(self) -> None:
                outer.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: Any) -> None:
        """One request."""
        path = unquote(urlsplit(request.path).path).strip("/")
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length) if length else b""
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._send(request, 401, {"error": "Invalid credentials"}, {"X-Error-Code": "GatedRepo"})
        if path == f"api/datasets/{self.repo}" or path.startswith(f"api/datasets/{self.repo}/revision/"):
            return self._send(request, 200, {"id": self.repo, "sha": COMMIT, "siblings": []})
        if path.startswith(f"api/datasets/{self.repo}/tree/"):
            below = path.removeprefix(f"api/datasets/{self.repo}/tree/").partition("/")[2]
            place = self.folder / below
            if not place.is_dir():
                return self._missing(request)
            return self._send(request, 200, [self._entry(child) for child in sorted(place.iterdir())])
        if path.startswith(f"api/datasets/{self.repo}/paths-info/"):
            wanted = json.loads(body)["paths"]
            found = [self.folder / one for one in wanted if (self.folder / one).exists()]
            return self._send(request, 200, [self._entry(one) for one in found])
        if path.startswith(f"datasets/{self.repo}/resolve/"):
            name = path.removeprefix(f"datasets/{self.repo}/resolve/").partition("/")[2]
            place = self.folder / name
            if not place.is_file():
                return self._missing(request)
            return self._file(request, place)
        if path.startswith(("api/datasets", "datasets")):  # the library also reports on itself elsewhere
            self.unknown.append(f"{request.command} {request.path}")
        return self._missing(request, "RepoNotFound")

    def _missing(self, request: Any, code: str = "EntryNotFound") -> None:
        self._send(request, 404, {"error": "not found"}, {"X-Error-Code": code})

    def _entry(self, place: Path) -> dict[str, Any]:
        name = str(place.relative_to(self.folder))
        if place.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        data = place.read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, request: Any, place: Path) -> None:
        data, status, headers = place.read_bytes(), 200, {"ETag": '"1"', "X-Repo-Commit": COMMIT}
        wanted = request.headers.get("Range")
        if wanted:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            last = min(len(data) - 1, int(stop) if stop else len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            data, status = data[int(start) : last + 1], 206
        self.reads += request.command == "GET"
        self._send(request, status, data, headers)

    def _send(self, request: Any, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
