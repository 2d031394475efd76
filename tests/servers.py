"""Servers on this machine that tests start and end: S3, Azure, plain files. Faults: `proxy`."""

from __future__ import annotations

import base64
import hmac
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import pytest
from processes import started

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client opens many connections at once; those that are not taken try again after a second.
    request_queue_size = 128


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of this machine while the block runs; yields the URL."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(BaseHTTPRequestHandler):
    """What keeps connections, answers in one go and prints nothing."""

    protocol_version = "HTTP/1.1"
    # Headers and body in two packets wait for one another's receipt, 40 ms each time.
    wbufsize = -1
    disable_nagle_algorithm = True

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

    class Handler(Quiet):
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


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server in the memory of this process."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self: S3Response) -> Any:
        # It looks whether an object is there, and makes it later: of 400 that eight put at once
        # under "If-None-Match: *" six were granted to two of them. S3 grants each to one.
        with one_at_a_time:
            return put(self)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        server.start()
        try:
            host, port = server.get_host_and_port()
            yield f"http://{host}:{port}"
        finally:
            server.stop()


AZURE_ACCOUNT, AZURE_KEY = (
    "devstoreaccount1",
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
)
"""Of every Azurite, as its documentation says."""


def azurite() -> str | None:
    """Find the program: of this environment, where `make test-long` puts it, or of the machine."""
    own = Path(sys.prefix, "azurite", "node_modules", ".bin")
    return shutil.which("azurite-blob", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")


@contextmanager
def azure_server(container: str) -> Iterator[str]:
    """Azure's object storage in the memory of a process, with a container.

    Yields
    ------
    str
        URL, to which the account's name belongs.
    """
    program = azurite()
    assert program is not None, "Azurite is not installed"
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with started([program, "--blobHost", "127.0.0.1", "--blobPort", "0", *options]) as server:
        said = ""
        while "listens on" not in said:
            said = server.line()
            assert said, "Azurite has ended"
        url = f"{said.split()[-1]}/{AZURE_ACCOUNT}"
        urlopen(_making(url, container)).close()
        yield url


def azure_variables(url: str) -> dict[str, str]:
    """Return the variables of the environment that lead to `url`, with the account's name."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_ALLOW_HTTP": "true",
    }


def _making(url: str, container: str) -> Request:
    """Ask for a container, signed as Azure documents under "Authorize with Shared Key"."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    # Eleven standard headers of which there is none; the account is in the path once more.
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
    lines += [f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}", "restype:container"]
    signed = hmac.digest(base64.b64decode(AZURE_KEY), "\n".join(lines).encode(), "sha256")
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signed).decode()}"
    # Otherwise urllib names a type, which would be signed.
    return Request(f"{url}/{container}?restype=container", headers=headers, method="PUT")
