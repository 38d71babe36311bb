"""A model hub without a network: its cache as downloads leave it, and its HTTP interface on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill_cache(cache: Path, hub_id: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """The snapshot's folder: symbolic links to files named by their hash."""
    model = cache / f"models--{hub_id.replace('/', '--')}"
    (model / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (model / "refs" / revision).write_text(COMMIT, encoding="utf-8")
    (model / "blobs").mkdir(exist_ok=True)
    for name, data in files.items():
        blob, link = model / "blobs" / hashlib.sha256(data).hexdigest(), model / "snapshots" / COMMIT / name
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return model / "snapshots" / COMMIT


@contextmanager
def serve(hub_id: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has one model, and which of its files were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            headers: dict[str, str] = {}
            if path.startswith(f"/api/models/{hub_id}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                status, body = 200, json.dumps(entries).encode()
            elif path.startswith(f"/api/models/{hub_id}"):
                status, body = 200, json.dumps({"id": hub_id, "sha": COMMIT, "siblings": []}).encode()
            else:
                name = path.removeprefix(f"/{hub_id}/resolve/").partition("/")[2]
                found = path.startswith(f"/{hub_id}/resolve/") and name in files
                status, body = (200, files[name]) if found else (404, b"")
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
                if not found:
                    headers["X-Error-Code"] = "EntryNotFound"
                asked.extend([name] * found)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
