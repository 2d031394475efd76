"""The proxy before the S3 server does what its faults say, to the same requests in every run."""

from __future__ import annotations

import http.client
from collections import Counter
from urllib.parse import urlsplit

import obstore
import pytest
from conftest import BUCKET
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store
from proxy import Faults, Proxy

# To this server it does not matter who asks, only that somebody does.
_ANYBODY = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"


def ask(url: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes] | None:
    """Ask once; None where no answer came."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, {"Authorization": _ANYBODY})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.RemoteDisconnected:
        return None
    finally:
        connection.close()


def s3_client(proxy: Proxy, prefix: str, retries: int = 4) -> S3Store:
    return S3Store(
        BUCKET,
        prefix=prefix,
        endpoint=proxy.url,
        client_options={"allow_http": True},
        retry_config={"max_retries": retries},
    )


def test_what_is_asked_is_counted_and_put_once_where_nothing_was(aws, tmp_path):
    proxy = aws()
    client = s3_client(proxy, tmp_path.name)
    obstore.put(client, "0", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(client, "0", b"second", mode="create")
    assert bytes(obstore.get(client, "0").bytes()) == b"first"
    assert [found["path"] for found in obstore.list(client).collect()] == ["0"]
    obstore.head(client, "0")
    obstore.delete(client, "0")
    assert proxy.requests["PUT"] == 2
    assert (proxy.requests["GET"], proxy.requests["LIST"], proxy.requests["HEAD"]) == (1, 1, 1)
    assert proxy.requests["DELETE"] + proxy.requests["POST"] == 1
    assert not proxy.done
    proxy.forget()
    assert not proxy.requests


def test_an_answer_is_lost_after_the_server_did_the_work(aws, s3, tmp_path):
    proxy = aws(lost=1.0, methods="PUT")
    path = f"/{BUCKET}/{tmp_path.name}"
    assert ask(proxy.url, "PUT", path, b"there") is None
    assert ask(s3, "GET", path) == ask(proxy.url, "GET", path) == (200, b"there")
    assert proxy.done == {"lost": 1}


def test_who_tries_again_is_told_that_it_is_there_already(aws, tmp_path):
    first = next(n for n in range(99) if lost(1, seed=n) and not lost(2, seed=n))
    proxy = aws(lost=0.5, methods="PUT", seed=first)
    client = s3_client(proxy, tmp_path.name)
    with pytest.raises(AlreadyExistsError):  # its own
        obstore.put(client, "0", b"once", mode="create")
    assert (proxy.requests["PUT"], proxy.done) == (2, {"lost": 1})
    assert bytes(obstore.get(client, "0").bytes()) == b"once"


def lost(number: int, *, seed: int) -> bool:
    return Faults(lost=0.5, seed=seed).of(number) == "lost"


def test_a_busy_server_has_done_nothing_and_a_body_is_cut(aws, s3, tmp_path):
    path = f"/{BUCKET}/{tmp_path.name}"
    proxy = aws(busy=1.0, path=tmp_path.name)
    assert ask(proxy.url, "PUT", path, b"gone") == (503, b"")
    answer = ask(s3, "GET", path)
    assert answer is not None
    assert answer[0] == 404
    ask(s3, "PUT", path, b"twelve bytes")
    proxy.faults = Faults(cut=1.0)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy.url, "GET", path)
    assert (caught.value.partial, caught.value.expected) == (b"twelve", 6)
    assert proxy.done == {"busy": 1, "cut": 1}


def test_faults_go_by_number_and_seed():
    drawn = [Faults(busy=0.1, cut=0.2, lost=0.3, seed=7).of(n) for n in range(2000)]
    assert drawn == [Faults(busy=0.1, cut=0.2, lost=0.3, seed=7).of(n) for n in range(2000)]
    assert drawn != [Faults(busy=0.1, cut=0.2, lost=0.3, seed=8).of(n) for n in range(2000)]
    counts = Counter(drawn)
    for name, share in {"busy": 0.1, "cut": 0.2, "lost": 0.3, "": 0.4}.items():
        assert counts[name] == pytest.approx(2000 * share, rel=0.2)
    assert not any(Faults().of(n) for n in range(100))


def test_what_goes_through_the_proxy_is_done_to_the_same_requests(aws, tmp_path):
    done = []
    for run in range(2):
        proxy = aws(busy=0.3, lost=0.3, methods="PUT", seed=3)
        answers = [
            ask(proxy.url, "PUT", f"/{BUCKET}/{tmp_path.name}/{run}/{number}", b"x")
            for number in range(12)
        ]
        done.append([None if answer is None else answer[0] for answer in answers])
    assert done[0] == done[1]
    assert set(done[0]) == {None, 200, 503}
