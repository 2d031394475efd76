"""A proxy before a server: it counts requests, and does harm by their numbers."""

from __future__ import annotations

import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from servers import Quiet, serving

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Faults:
    """What is done to which requests, by seed and number: the same ones in every run.

    Parameters
    ----------
    busy : float
        Share of requests that are answered with 503 and not handed on.
    cut : float
        Share of which the answer's body ends in the middle.
    lost : float
        Share that the server does, and whose client hears nothing of it.
    delay : float
        Seconds that each takes longer, on the average.
    methods : str
        Those of which shares are taken, of ``"GET HEAD LIST PUT POST DELETE"``; others are let
        through. Of a GET only the body is cut.
    path : str
        Pattern that is found in the paths of which shares are taken.
    seed : int
        Another one does it to other requests.
    """

    busy: float = 0.0
    cut: float = 0.0
    lost: float = 0.0
    delay: float = 0.0
    methods: str = "GET HEAD LIST PUT POST DELETE"
    path: str = ""
    seed: int = 0

    def concern(self, method: str, path: str) -> bool:
        """Whether a request is of those of which shares are taken."""
        return method in self.methods.split() and re.search(self.path, path) is not None

    def of(self, number: int) -> str:
        """Give what is done to a request: ``"busy"``, ``"cut"``, ``"lost"`` or nothing."""
        drawn = random.Random(f"{self.seed} {number}").random()
        for name in ("busy", "cut", "lost"):
            drawn -= getattr(self, name)
            if drawn < 0:
                return name
        return ""


class Proxy:
    """A server before another one.

    Attributes
    ----------
    url : str
        Where it listens.
    asked : list of str
        Method, path and range of each request.
    requests : Counter
        Requests by method; a GET that lists is a LIST.
    done : Counter
        Faults by name.
    faults : Faults
        May be replaced at any time; requests are counted on.
    harm : callable
        Called with a request's path, its status and the answer's body; gives the status and the
        body that go out instead. A body that is shorter than the answer's ends too early.
    """

    def __init__(self, upstream: str, faults: Faults) -> None:
        self.url = ""
        self.asked: list[str] = []
        self.requests: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.faults = faults
        self.harm: Callable[[str, int, bytes], tuple[int, bytes]] = lambda path, status, body: (
            status,
            body,
        )
        self._upstream = urlsplit(upstream).netloc
        self._numbers = 0
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Count from none again; the numbers that faults go by go on."""
        with self._lock:
            self.asked.clear()
            self.requests.clear()
            self.done.clear()

    def count(self, method: str, path: str, span: str) -> str:
        """Count a request; give what is to be done to it, see `Faults.of`."""
        name = "LIST" if method == "GET" and "list-type=" in urlsplit(path).query else method
        with self._lock:
            self.asked.append(f"{method} {path} {span}".strip())
            self.requests[name] += 1
            if not self.faults.concern(name, path):
                return ""
            self._numbers += 1
            fault = self.faults.of(self._numbers)
            if fault == "cut" and method != "GET":
                fault = ""
            self.done.update([fault] if fault else [])
            return fault

    def forward(self, request: Quiet, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """Ask the server behind, and return its answer."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        # The rest as it came: a signature is of them, that of the host too.
        headers = {k: v for k, v in request.headers.items() if k.lower() != "expect"}
        try:
            connection.request(request.command, request.path, body or None, headers)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def handler(self) -> type[Quiet]:
        """Give what answers a request."""
        proxy = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                span = self.headers.get("Range", "").removeprefix("bytes=")
                fault = proxy.count(self.command, self.path, span)
                time.sleep(proxy.faults.delay)
                if fault == "busy":
                    self.answer(503, [("Content-Length", "0")], b"")
                    return
                answer, body = proxy.forward(self, given)
                if fault == "lost":
                    self.close_connection = True
                    return
                status, sent = proxy.harm(self.path, answer.status, body)
                if fault == "cut":
                    sent = sent[: len(sent) // 2]
                self._pass_on(answer, status, body, sent)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def _pass_on(
                self, answer: http.client.HTTPResponse, status: int, body: bytes, sent: bytes
            ) -> None:
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
                length = len(body) if status == answer.status else len(sent)
                if self.command == "HEAD":
                    length = int(answer.getheader("Content-Length") or 0)
                self.answer(status, [*headers, ("Content-Length", str(length))], sent)
                if self.command != "HEAD" and len(sent) < length:
                    self.close_connection = True

        return Handler


@contextmanager
def proxied(upstream: str, faults: Faults | None = None) -> Iterator[Proxy]:
    """Serve a proxy before the server at `upstream` while the block runs."""
    proxy = Proxy(upstream, faults or Faults())
    with serving(proxy.handler()) as proxy.url:
        yield proxy
