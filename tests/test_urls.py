"""Stores behind URLs: what is read is what a folder has, in few requests, whatever servers do."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import obstore
import pytest
import xarray as xr
from click.testing import CliRunner
from conftest import BUCKET, SMALL, fill
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, S3Store
from PIL import Image
from proxy import Proxy, proxied
from servers import (
    AZURE_ACCOUNT,
    AZURE_KEY,
    azure_server,
    azure_variables,
    azurite,
    file_server,
    serving,
)

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.common.location import Address, location
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.images.png import read_provenance
from fedgfe_store.recording import Recorder
from fedgfe_store.storage import objects


@dataclass(frozen=True)
class Served:
    """A store in a folder and at a URL, and the proxy before its server."""

    local: EmbeddingStore
    url: str
    proxy: Proxy

    def open(self, **options) -> EmbeddingStore:
        return EmbeddingStore.open(self.url, **options)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Three nodes, two rounds; one record deleted, one replaced, and some compacted away."""
    path = tmp_path_factory.mktemp("local") / "embeddings.zarr"
    store = EmbeddingStore.create(path, SMALL)
    for node in (0, 1, "server"):
        for number in (1, 5):
            fill(store, node=node, round=number)
    store.delete(node=0, round=1, class_name="cat")
    store.compact()
    store.delete(node=1, round=5, class_name="cat", index=1)
    return store


@pytest.fixture
def credentials(aws, monkeypatch):
    """Those of the S3 server, and few retries, so that no test waits for long."""
    monkeypatch.setitem(objects.RETRIES, "max_retries", 4)


def upload(folder: Path, client: S3Store | AzureStore) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(client, path.relative_to(folder).as_posix(), path.read_bytes())


def s3_client(url: str, prefix: str) -> S3Store:
    return S3Store(BUCKET, prefix=prefix, endpoint=url, client_options={"allow_http": True})


@pytest.fixture(scope="module")
def in_the_bucket(filled, s3):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        upload(filled.path, s3_client(s3, "urls/embeddings.zarr"))
    return f"s3://{BUCKET}/urls/embeddings.zarr"


@pytest.fixture
def on_s3(filled, in_the_bucket, aws, credentials):
    return Served(filled, in_the_bucket, aws())


@pytest.fixture(scope="module")
def azure(filled):
    """Azure's server, with the store."""
    if azurite() is None:
        pytest.skip("Azurite is not installed: `make test-long` does so where there is npm")
    with azure_server(BUCKET) as url:
        client = AzureStore(
            BUCKET,
            prefix="embeddings.zarr",
            account_name=AZURE_ACCOUNT,
            account_key=AZURE_KEY,
            endpoint=url,
            client_options={"allow_http": True},
        )
        upload(filled.path, client)
        with pytest.raises(AlreadyExistsError):
            obstore.put(client, "zarr.json", b"", mode="create")
        yield url


@pytest.fixture
def on_azure(filled, azure, credentials, monkeypatch):
    with proxied(azure) as proxy:
        for name, value in azure_variables(f"{proxy.url}/{AZURE_ACCOUNT}").items():
            monkeypatch.setenv(name, value)
        yield Served(filled, f"az://{BUCKET}/embeddings.zarr", proxy)


@pytest.fixture
def on_the_web(filled, credentials):
    with serving(file_server(filled.path.parent)) as files, proxied(files) as proxy:
        yield Served(filled, f"{proxy.url}/embeddings.zarr", proxy)


@pytest.fixture(params=["s3", "web", pytest.param("azure", marks=pytest.mark.long)])
def served(request):
    fixtures = {"s3": "on_s3", "web": "on_the_web", "azure": "on_azure"}
    return request.getfixturevalue(fixtures[request.param])


def same(one, other) -> None:
    """All that a reader can see of two selections, bit for bit."""
    assert one.keys() == other.keys()
    assert one.records.equals(other.records)
    for column in ("t5", "clip"):
        assert one.read(column).tobytes() == other.read(column).tobytes()


def test_what_is_read_is_what_the_folder_has(served):
    there = served.open()
    assert (there.id, there.commit, len(there)) == (
        served.local.id,
        served.local.commit,
        len(served.local),
    )
    assert (str(there.location), there.location.name) == (served.url, "embeddings.zarr")
    same(there.select(), served.local.select())
    wanted = {"node": ["server", 1], "class_name": "cat", "round": 5}
    same(there.select(**wanted).take([3, 0]), served.local.select(**wanted).take([3, 0]))
    batches = [batch["t5"].numpy() for batch in there.select(round=5).batches(4)]
    np.testing.assert_array_equal(np.concatenate(batches), served.local.select(round=5).read("t5"))


@pytest.mark.long
def test_the_past_and_the_history(served):
    past, there = served.open(as_of=6), served.open()
    before = EmbeddingStore.open(served.local.path, as_of=6).select()
    assert past.select().keys() == before.keys()
    gone = past.select().compacted_away()
    np.testing.assert_array_equal(gone, before.compacted_away())
    kept = np.flatnonzero(~gone)
    same(past.select().take(kept), before.take(kept))
    with pytest.raises(NotFoundError, match="was compacted away"):
        past.select().read("t5")
    told, known = there.history(), served.local.history()
    assert told.drop(columns="bytes").equals(known.drop(columns="bytes"))
    if not served.url.startswith("http"):
        assert told["bytes"].tolist() == known["bytes"].tolist()
    assert there.verify() == served.local.verify()


def test_xarray_opens_it(served):
    dataset = xr.open_dataset(served.url, engine="fedgfe")
    known = xr.open_dataset(served.local.path, engine="fedgfe")
    xr.testing.assert_equal(dataset, known)
    assert dataset.sel(round=5, class_name="cat", node="0").sizes["record"] == 3


@pytest.mark.parametrize("suffixes", [True, False])
def test_twelve_records_are_there_with_few_requests(on_s3, suffixes, monkeypatch):
    if not suffixes:  # as of Azure, which counts no range from the end

        def get(client, name, options=None, get=obstore.get):
            if options is not None:
                raise obstore.exceptions.NotSupportedError("no such range")
            return get(client, name)

        monkeypatch.setattr(obstore, "get", get)
    selection = on_s3.open().select(round=5, class_name=["dog", "cat"], index=[0, 2])
    assert len(selection) == 12
    found = {name: selection.read(name) for name in ("t5", "clip")}
    known = on_s3.local.select(round=5, class_name=["dog", "cat"], index=[0, 2])
    for name, values in found.items():
        assert values.tobytes() == known.read(name).tobytes()
    # What docs/scale.md says.
    assert len(on_s3.proxy.asked) == (20 if suffixes else 32), on_s3.proxy.asked


@pytest.mark.long
def test_what_is_large_is_asked_for_in_parts_and_together(s3, aws, tmp_path):
    schema = Schema.flux(64, width=1024, clip=(4,), granule=64)
    local = EmbeddingStore.create(tmp_path / "large.zarr", schema)
    fill(local, node=0, round=1, n=20)
    upload(local.path, s3_client(s3, f"{tmp_path.name}/large.zarr"))
    proxy = aws()
    there = EmbeddingStore.open(f"s3://{BUCKET}/{tmp_path.name}/large.zarr")
    rows = [*range(10, 22), 30]
    part = there.select().take(rows)
    part.keys()  # key columns are there now
    part.column("timestamp")
    proxy.asked.clear()
    assert part.read("t5").tobytes() == local.select().take(rows).read("t5").tobytes()
    spans = [line.split()[-1] for line in proxy.asked if "/t5/c." in line]
    assert len(spans) == 3  # its end, twelve records in a row, and one
    again = there.select().take([5])
    proxy.asked.clear()
    again.read("t5")
    assert len(proxy.asked) == 1  # where it lies is known
    assert there.verify().sound


def test_a_server_that_is_busy_or_breaks_off_is_asked_again(served):
    seen: dict[str, int] = {}

    def harm(path: str, status: int, body: bytes) -> tuple[int, bytes]:
        seen[path] = seen.get(path, 0) + 1
        if seen[path] == 1:
            return 503, b""
        return (status, body[: len(body) // 2]) if seen[path] == 2 else (status, body)

    served.proxy.harm = harm
    same(served.open().select(round=5), served.local.select(round=5))
    assert max(seen.values()) > 2


@pytest.mark.parametrize("status", [403, pytest.param(500, marks=pytest.mark.long)])
def test_a_server_that_refuses_is_named_with_what_was_asked(served, status):
    there = served.open()
    served.proxy.harm = lambda path, _, body: (status, b"")
    with pytest.raises(ConnectionError) as caught:
        there.select().keys()
    assert str(caught.value).startswith(f"{served.url}/")
    assert "cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConnectionError):
        there.verify()


@pytest.mark.long
def test_nothing_there_and_nobody_there(on_s3, monkeypatch):
    with pytest.raises(NotFoundError, match=f"no embedding store at s3://{BUCKET}/other"):
        EmbeddingStore.open(f"s3://{BUCKET}/other/")
    there = on_s3.open()
    with serving(file_server(Path())) as url:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)  # where nobody listens any more
    with pytest.raises(ConnectionError, match="cannot be read"):
        on_s3.open()
    there.refresh()
    assert len(there) == len(on_s3.local)


def test_a_changed_byte_is_damage(served):
    def harm(path: str, status: int, body: bytes) -> tuple[int, bytes]:
        if "/t5/c." not in path or not body:  # or the answer to HEAD
            return status, body
        middle = len(body) // 2
        return status, body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]

    there = served.open()
    served.proxy.harm = harm
    with pytest.raises(DamagedDataError, match=f"t5 of .* {served.url}/t5/c.*is damaged"):
        there.select().read("t5")


def test_a_tensor_file_that_is_gone_is_missing(on_s3):
    there = on_s3.open()
    on_s3.proxy.harm = lambda path, status, body: (
        (404, b"") if "/clip/c." in path else (status, body)
    )
    assert there.select().read("t5").any()
    with pytest.raises(DamagedDataError, match="clip of .* is missing"):
        there.select().read("clip")


@pytest.mark.parametrize(
    "write",
    [
        lambda store, path: store.append(node=0),
        lambda store, path: store.delete(node=0),
        lambda store, path: store.compact(),
        lambda store, path: store.verify(repair=True),
        lambda store, path: store.upgrade(),
        lambda store, path: store.backup(path),
        lambda store, path: store.merge(store),
        lambda store, path: EmbeddingStore.create(f"{store.location}2", SMALL),
        lambda store, path: Recorder(store),
        lambda store, path: Recorder(str(store.location)),
    ],
)
def test_nothing_is_written_behind_a_url(on_s3, tmp_path, write):
    store = on_s3.open()
    on_s3.proxy.forget()
    with pytest.raises(SchemaMismatchError, match="s3://.* can be read only"):
        write(store, tmp_path / "copy")
    assert not {"PUT", "POST", "DELETE"} & on_s3.proxy.requests.keys()


def test_its_records_are_merged_into_a_store_here(served, store):
    store.merge(served.open())
    keys = sorted(map(str, served.local.select().keys()))
    assert sorted(map(str, store.select().keys())) == keys
    key = {"node": 1, "round": 5, "class_name": "dog"}
    found, known = store.select(**key).read("t5"), served.local.select(**key).read("t5")
    assert found.tobytes() == known.tobytes()


def _child(store, queue) -> None:
    try:
        queue.put(len(store.select(round=1).keys()))
    except ConnectionError as error:
        queue.put(str(error))


def test_a_forked_child_is_told_to_be_spawned(on_s3):
    context = multiprocessing.get_context("fork")
    queue, there = context.SimpleQueue(), on_s3.open()
    child = context.Process(target=_child, args=(there, queue))
    child.start()
    assert "start it by 'spawn'" in queue.get()
    child.join()


@pytest.mark.long
def test_a_spawned_child_reads_it(on_s3):
    context = multiprocessing.get_context("spawn")
    queue, there = context.SimpleQueue(), on_s3.open()
    child = context.Process(target=_child, args=(there, queue))
    child.start()
    assert queue.get() == len(on_s3.local.select(round=1))
    child.join()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/a/b.zarr/", "s3://bucket/a/b.zarr"),
        ("HTTPS://host/x", "https://host/x"),
        ("az://container/x", "az://container/x"),
        ("gs://bucket/x", "gs://bucket/x"),
    ],
)
def test_urls(given, url):
    assert location(given) == Address(url)


@pytest.mark.parametrize(
    "given", ["ftp://host/x", "s3://", "https://me:secret@host/x", "https://host/x?sig=secret"]
)
def test_what_is_no_url_of_a_store_is_refused_and_secrets_are_not_shown(given):
    with pytest.raises(SchemaMismatchError, match="path: expected") as caught:
        EmbeddingStore.open(given)
    assert "secret" not in str(caught.value)


def run(*arguments: str, url: str, code: int = 0) -> str:
    result = CliRunner(env={"FEDGFE_STORE": url}).invoke(group, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.long
def test_commands_that_read(on_s3):
    told = run("info", url=on_s3.url)
    assert on_s3.url in told
    assert run("query", "--round", "5", "--format", "csv", url=on_s3.url) == run(
        "query", "--round", "5", "--format", "csv", url=str(on_s3.local.path)
    )
    for command in (["history"], ["verify"], ["stats"], ["stats", "--column", "clip"]):
        there, here = run(*command, url=on_s3.url), run(*command, url=str(on_s3.local.path))
        assert there.replace(on_s3.url, "STORE") == here.replace(str(on_s3.local.path), "STORE")


def test_commands_that_read_from_the_web(on_the_web):
    assert "its server does not list files" in run("info", url=on_the_web.url)
    assert "sound" in run("verify", url=on_the_web.url)


@pytest.mark.parametrize(
    "arguments",
    [
        ["init"],
        ["import", "."],
        ["encode", "--prompt", "a dog", "--class", "dog"],
        ["delete", "--node", "0", "--yes"],
        ["compact"],
        ["verify", "--repair"],
        ["upgrade"],
        ["merge", "other.zarr"],
        ["backup", "copy.zarr"],
    ],
)
def test_commands_that_write_refuse_in_one_line(on_s3, arguments):
    told = run(*arguments, url=on_s3.url, code=1)
    assert f"error: {on_s3.url} can be read only" in told
    assert len(told.splitlines()) == 1


@pytest.mark.long
def test_images_are_made_from_it_and_compared_with_it(on_s3, flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = ["--node", "server", "--round", "5", "--class", "dog"]
    size = ["--height", "32", "--width", "32", "--steps", "1"]
    command = ["generate", "--model", str(flux), "--device", "cpu", *size, *wanted]
    run(*command, "--output-dir", "here", url=str(on_s3.local.path))
    run(*command, url=on_s3.url)
    folder = tmp_path / "output_images" / "embeddings"  # from the last part of the URL
    images = sorted(folder.glob("*.png"))
    assert len(images) == 3
    for image in images:
        facts, known = read_provenance(image), read_provenance(tmp_path / "here" / image.name)
        assert facts is not None
        assert known is not None
        assert (facts["store"], facts["digests"]) == (on_s3.url, known["digests"])
        with Image.open(image) as one, Image.open(tmp_path / "here" / image.name) as other:
            assert one.tobytes() == other.tobytes()
    assert "3 images: 3 done" in run(*command, "--dry-run", url=on_s3.url)
    assert "nothing is missing" in run("status", *wanted, url=on_s3.url)
    assert "gallery.html" in run("gallery", url=on_s3.url)
    assert "out of date" not in run("sheet", url=on_s3.url)
    # An image names its store: it is found again where no other one is named.
    monkeypatch.delenv("FEDGFE_STORE", raising=False)
    again = ["generate", "--from-image", str(images[0]), "--device", "cpu"]
    made = CliRunner().invoke(group, again)
    assert made.exit_code == 0, made.output
    with Image.open(folder / "again" / images[0].name) as one, Image.open(images[0]) as other:
        assert one.tobytes() == other.tobytes()
