"""A server of one Hub repository's files, which answers requests for ranges of bytes and counts what it sends."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer:
    """The files of `folder` as those of any repository, at `address`; `sent` counts bytes of files by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, ""
        self.sent: dict[str, int] = {}
        self.requests: list[str] = []  # for files
        self.is_broken = False


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve the parts of the Hub's API that `HfFileSystem` asks for, on a free port of this machine."""
    served = RangeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/tree/" in self.path:
                files = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                    for path in folder.iterdir()
                ]
                self.answer(json.dumps(files).encode())
                return
            if self.path.startswith("/api/"):
                self.answer(json.dumps({"id": "owner/name", "sha": "1" * 40, "siblings": []}).encode())
                return
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            served.requests.append(name)
            if served.is_broken:
                self.answer(b"{}", 400)
                return
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            with (folder / name).open("rb") as file:
                file.seek(int(first))
                data = file.read(int(last) + 1 - int(first))
            served.sent[name] = served.sent.get(name, 0) + len(data)
            self.answer(data, 206)

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
