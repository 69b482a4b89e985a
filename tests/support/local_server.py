"""An HTTP server on this machine that misbehaves as told."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """How a path answers. cuts: bytes after which the connection is broken, one for each request; then it holds.

    ranges: honours Range. size: sends Content-Length. status, location: answers with that and no content.
    total: the length told in Content-Range.
    """

    content: bytes = b""
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    size: bool = True
    status: list[int] = field(default_factory=list)
    location: str = ""
    shift: int = 0  # Content-Range lies by so many bytes
    total: str = ""


class Server:
    """An HTTP server whose paths behave as told, and that keeps what was asked of it: (path, Range or None)."""

    def __init__(self):
        self.paths: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def url(self, path, **behaviour):
        self.paths[path] = Behaviour(**behaviour)
        return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def answer(self, request):
        path = request.path.lstrip("/")
        behaviour = self.paths.get(path) or Behaviour(status=[404] * 99)
        asked = request.headers.get("Range")
        self.requests.append((path, asked))
        request.close_connection = True
        if behaviour.status and (status := behaviour.status.pop(0)) != 200:
            request.send_response(status)
            if behaviour.location:
                request.send_header("Location", behaviour.location)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, start = behaviour.content, 0
        if asked and behaviour.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            total = behaviour.total or len(content)
            first = start + behaviour.shift
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{total}")
        else:
            request.send_response(200)
        rest = content[start:]
        if behaviour.size:
            request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        request.wfile.write(rest[: behaviour.cuts.pop(0)] if behaviour.cuts else rest)
