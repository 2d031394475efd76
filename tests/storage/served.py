"""Readers of a store at a URL, whose server is busy, breaks off and loses answers."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ceph import CEPH_KEY, CEPH_SECRET, ceph_server, has_ceph
from children import in_child
from figures import Figures
from operations import SCHEMA, put
from proxy import Faults, proxied
from servers import AZURE_ACCOUNT, azure_server, azure_variables, azurite, s3_server
from system_calls import no_flushes

from fedgfe_store import EmbeddingStore

_BUCKET, _NAME = "experiments", "s.zarr"
_NODES, _ROUNDS = 4, 8
_FAULTS = partial(Faults, busy=0.05, cut=0.05, lost=0.05)


@dataclass(frozen=True)
class Server:
    """A server that is there: its URL, the store's, and the variables that lead to a URL of it."""

    url: str
    store: str
    variables: Callable[[str], dict[str, str]]


def _aws(key: str, secret: str, endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": endpoint,
    }


def _azure(endpoint: str) -> dict[str, str]:
    return azure_variables(f"{endpoint}/{AZURE_ACCOUNT}")


@contextmanager
def _moto() -> Iterator[Server]:
    from urllib.request import Request, urlopen

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as url:
        urlopen(Request(f"{url}/{_BUCKET}", method="PUT")).close()
        yield Server(url, f"s3://{_BUCKET}/{_NAME}", partial(_aws, "test", "test"))


@contextmanager
def _ceph() -> Iterator[Server]:
    # Of a short name: the paths of its sockets have bounds.
    with tempfile.TemporaryDirectory() as folder, ceph_server(Path(folder), _BUCKET) as url:
        yield Server(url, f"s3://{_BUCKET}/{_NAME}", partial(_aws, CEPH_KEY, CEPH_SECRET))


@contextmanager
def _azurite() -> Iterator[Server]:
    with azure_server(_BUCKET) as url:
        yield Server(url.removesuffix(f"/{AZURE_ACCOUNT}"), f"az://{_BUCKET}/{_NAME}", _azure)


SERVERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "moto": (lambda: True, _moto),
    "Azurite": (azurite, _azurite),
    "Ceph": (has_ceph, _ceph),
}


def faulty_servers(root: Path, *, seed: int, names: tuple[str, ...], queries: int) -> Figures:
    """Read from each server that is installed through a proxy; all has to be as in the folder."""
    figures = Figures()
    for name in names:
        is_there, server = SERVERS[name]
        if not is_there():
            figures.counts[f"{name} is not installed"] = 1
            continue
        # What the servers and their client need does not go along with a fork.
        found = in_child(partial(_read_from, root, name, server, seed=seed, queries=queries))
        figures.counts += found.counts
        figures.faults += found.faults
    return figures


def _read_from(
    root: Path, name: str, server: Callable[[], Any], *, seed: int, queries: int
) -> Figures:
    figures, draw = Figures(), random.Random(seed)
    local = _made(root / f"{name}.zarr")
    with server() as there, proxied(there.url) as proxy:
        os.environ.update(there.variables(proxy.url))
        _upload(local.path, there.store)
        proxy.faults = _FAULTS(seed=seed)
        proxy.forget()
        for number in range(queries):
            wanted = {"node": draw.randrange(_NODES), "round": draw.sample(range(_ROUNDS), 3)}
            figures.look(
                f"{name}, query {number} of seed {seed}, {wanted}",
                partial(_same, local, there.store, wanted),
            )
        figures.counts[f"{name}: requests"] = proxy.requests.total()
        figures.counts += Counter({f"{name}: {what}": n for what, n in proxy.done.items()})
    return figures


def _made(path: Path) -> EmbeddingStore:
    store = EmbeddingStore.create(path, SCHEMA)
    with no_flushes():
        for node in range(_NODES):
            for number in range(_ROUNDS):
                put(store, node=node, round=number, n=6, seed=node * 100 + number)
        store.delete(node=1, round=2)
    return store


def _upload(folder: Path, url: str) -> None:
    import obstore
    from obstore.store import from_url

    client = from_url(url, client_options={"allow_http": True})
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(client, path.relative_to(folder).as_posix(), path.read_bytes())


def _same(local: EmbeddingStore, url: str, wanted: dict[str, Any]) -> str:
    here, there = local.select(**wanted), EmbeddingStore.open(url).select(**wanted)
    assert there.keys() == here.keys(), "other keys"
    for column in ("t5", "clip", "audio"):
        assert there.read(column).tobytes() == here.read(column).tobytes(), f"another {column}"
    return "read"
