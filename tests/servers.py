"""Servers on this machine that tests start and end: S3, plain files, and faults before either."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of this machine while the block runs; yields the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def file_server(folder: Path) -> type[BaseHTTPRequestHandler]:
    """A plain web server of the files in `folder`: GET and HEAD, of whole files or one range."""

    class Handler(_Quiet):
        def do_GET(self) -> None:
            path = folder / unquote(urlsplit(self.path).path).lstrip("/")
            if not path.is_file():
                self.answer(404, [("Content-Length", "0")], b"")
                return
            whole, asked = path.read_bytes(), _RANGE.fullmatch(self.headers.get("Range", ""))
            status, body = 200, whole
            # With a tag a client that was cut off may ask for the rest.
            headers = [("ETag", f'"{hash(whole):x}"')]
            if asked is not None:
                first, last = asked.groups()
                start = int(first) if first else max(0, len(whole) - int(last))
                stop = int(last) + 1 if first and last else len(whole)
                status, body = 206, whole[start:stop]
                place = f"bytes {start}-{start + len(body) - 1}/{len(whole)}"
                headers.append(("Content-Range", place))
            self.answer(status, [*headers, ("Content-Length", str(len(body)))], body)

        do_HEAD = do_GET

    return Handler


class Proxy:
    """A server before another one: it keeps what was asked, and does harm where it is told to.

    Attributes
    ----------
    asked : list of str
        Method, path and range of each request.
    harm : callable
        Called with a request's path, its status and the answer's body; gives the status and the
        body that go out instead. A body that is shorter than the answer's ends too early.
    """

    def __init__(self, upstream: str) -> None:
        self.asked: list[str] = []
        self.harm: Callable[[str, int, bytes], tuple[int, bytes]] = lambda path, status, body: (
            status,
            body,
        )
        self._upstream = urlsplit(upstream).netloc

    def handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                span = self.headers.get("Range", "").removeprefix("bytes=")
                proxy.asked.append(f"{self.command} {self.path} {span}".strip())
                answer, body = proxy.forward(self)
                status, sent = proxy.harm(self.path, answer.status, body)
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
                length = len(body) if status == answer.status else len(sent)
                if self.command == "HEAD":
                    length = int(answer.getheader("Content-Length") or 0)
                self.answer(status, [*headers, ("Content-Length", str(length))], sent)
                if self.command != "HEAD" and len(sent) < length:
                    self.close_connection = True

            do_HEAD = do_GET

        return Handler

    def forward(self, request: BaseHTTPRequestHandler) -> tuple[http.client.HTTPResponse, bytes]:
        """Ask the server behind, and return its answer."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(request.command, request.path, headers=dict(request.headers))
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server in the memory of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
