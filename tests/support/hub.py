"""A stand-in for the Hugging Face hub and for other servers of files, on this machine, which can misbehave."""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server with one repository.

    Attributes:
        files: contents by path; served from ``/REPOSITORY/resolve/REVISION/PATH`` and from ``/PATH``.
        large: whether the hub keeps them by SHA-256 (as large files) or in Git.
        drop_after: each connection breaks after this many bytes of a file; 0: never.
        ranges: whether a file can be asked for from some byte on.
        status: answer everything with this status, if it is not 200.
        wrong: what is served differs from what the hub says of it.
        requests: the paths and ranges that were asked for.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    large: bool = True
    drop_after: int = 0
    ranges: bool = True
    status: int = 200
    wrong: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)

    def entry(self, path: str) -> dict:
        """Return what the hub says of a file."""
        content = self.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        about = {"type": "file", "path": path, "size": len(content), "oid": git}
        if self.large:
            about["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return about


@contextmanager
def serving(hub: Hub):
    """Serve a hub until the block ends; its address is then known."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self, content: bytes, status: int = 200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            hub.requests.append((path, self.headers.get("Range", "")))
            if hub.status != 200:
                return self.answer(b"no", hub.status)
            if path.startswith("/api/"):
                known = path.endswith(("/revision/main", f"/revision/{COMMIT}"))
                if not known:
                    return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
                return self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
            name = path.partition(f"/resolve/{COMMIT}/")[2] or path[1:]
            if name not in hub.files:
                return self.answer(b"no such file", 404)
            self.send_file(hub.files[name][:-1] + b"!" if hub.wrong else hub.files[name])

        def send_file(self, content: bytes):
            asked = self.headers.get("Range", "")
            first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and hub.ranges else 0
            if first and first >= len(content):
                return self.answer(b"", 416)
            part = content[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if hub.drop_after and len(part) > hub.drop_after:
                self.wfile.write(part[: hub.drop_after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(part)

        def do_POST(self):
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            if hub.status != 200:
                return self.answer(b"no", hub.status)
            found = [hub.entry(path) for path in asked if path in hub.files]
            self.answer(json.dumps(found).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
