"""A Hub on this machine that takes what `push_to_hub` uploads, and nothing else."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def mock_hub(folder: Path) -> Iterator[str]:
    """Serve the Hub's API on a free port, and write the files of every commit to `folder`. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                self.answer({"url": f"{address}/owner/name", "name": "owner/name", "id": "owner/name"})
            elif "/preupload/" in self.path:
                files = [file["path"] for file in json.loads(body)["files"]]
                self.answer(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
                )
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    operation = json.loads(line)
                    if operation["key"] == "file":
                        content = base64.b64decode(operation["value"]["content"])
                        (folder / operation["value"]["path"]).write_bytes(content)
                self.answer({"commitUrl": f"{address}/owner/name/commit/1", "commitOid": "1" * 40, "success": True})
            else:
                self.answer({}, 200 if "validate-yaml" in self.path else 404)

        def do_GET(self) -> None:
            self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET  # noqa: N815 - http.server calls it so

        def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
