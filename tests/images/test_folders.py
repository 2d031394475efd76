"""What else may lie in a folder of images: nothing hangs, breaks or is written through a link."""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import fill
from generation_fakes import SIZE, FakePipeline
from PIL import Image, PngImagePlugin

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import Settings, fingerprint, settings_json
from fedgfe_store.images import folder as folder_module
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.gallery import make_gallery
from fedgfe_store.images.manifest import Manifest, read_manifest
from fedgfe_store.images.png import inspect_image, png_names, write_png
from fedgfe_store.images.sheet import save_sheet
from fedgfe_store.images.status import image_status
from fedgfe_store.names import key_json

MADE_WITH = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
PIXELS = np.full((8, 8, 3), 99, np.uint8)
OPTIONS: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "batch_size": 2}


@pytest.fixture
def folder(store: EmbeddingStore, tmp_path: Path) -> Path:
    """Images of two records."""
    fill(store, node=0, round=5, n=1)
    path = tmp_path / "images"
    path.mkdir()
    for key in store.select().keys():
        facts = {"key": key_json(key), "image": 0, "settings": settings_json(MADE_WITH)}
        write_png(
            path / f"node_0_train_{key.class_name}_0_r5.png",
            PIXELS,
            {**facts, "fingerprint": fingerprint(MADE_WITH)},
        )
    return path


def apple_double(folder: Path) -> None:
    for name in png_names(folder):
        (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


def folder_like_a_picture(folder: Path) -> None:
    (folder / "sub.png").mkdir()


@pytest.mark.parametrize("put", [apple_double, pipe, folder_like_a_picture])
def test_what_is_no_picture_file_is_ignored_by_all_readers(
    store: EmbeddingStore, folder: Path, tmp_path: Path, put: Callable[[Path], None]
) -> None:
    put(folder)
    for command in (["gallery"], ["sheet", "--output", str(tmp_path / "a.png")]):
        options = ["--store", str(store.path), *command, "--input-dir", str(folder)]
        result = CliRunner().invoke(group, options)
        assert (result.exit_code, result.stderr) == (0, "")
    assert make_gallery(folder).left_out == {}
    assert len(ImageFolder.scan(folder).records) == 2
    assert len(ImageFolder.scan(folder).select()) == 2
    status = image_status(store.select(), folder)
    assert (len(status.frame), status.deleted) == (2, ())


def test_a_pipe_in_place_of_a_picture_is_replaced(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, n=1)
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / "node_0_train_dog_0_r5.png"
    os.mkfifo(place)
    assert inspect_image(place) == ("damaged", None)
    report = generate(store.select(), tmp_path / "out", pipeline=FakePipeline(flux), **OPTIONS)
    assert report.done == 2
    assert inspect_image(place)[0] == "ours"


def picture(text: str = "", size: tuple[int, int] | None = None) -> bytes:
    """A PNG file with that text about itself; with `size` its head only tells of one."""
    info = PngImagePlugin.PngInfo()
    info.add_text("fedgfe_store", text)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=info)
    data = bytearray(file.getvalue())
    if size is not None:
        import zlib

        head = (
            b"IHDR" + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + bytes(data[24:29])
        )
        data[12:33] = head + zlib.crc32(head).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        picture("[" * 100_000),
        picture("9" * 5000),
        picture('{"settings": 5}'),
        picture('"text"'),
        picture('{"settings": {"width": 60000, "height": 60000}}', (60_000, 60_000)),
        picture('{"settings": {"width": 8, "height": 8}, "key": {"node": 1}, "image": "x"}'),
    ],
    ids=["deep", "long", "number", "no object", "huge", "wrong types"],
)
def test_a_picture_of_others_ends_no_run(
    store: EmbeddingStore, folder: Path, content: bytes
) -> None:
    (folder / "odd.png").write_bytes(content)
    assert set(make_gallery(folder).left_out) == {"odd.png"}
    assert len(ImageFolder.scan(folder).select()) == 2
    assert len(image_status(store.select(), folder).frame) == 2


def test_names_that_no_terminal_shows_are_escaped(folder: Path) -> None:
    name = os.fsdecode(b"odd \xff\x1b[31m\n.png")
    Image.new("RGB", (8, 8)).save(folder / "odd.png")
    (folder / "odd.png").rename(folder / name)
    result = CliRunner().invoke(group, ["gallery", "--input-dir", str(folder)])
    assert result.exit_code == 0
    assert result.stderr == "left out: odd \\udcff\\x1b[31m\\n.png: says nothing about a record\n"


def full(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Let the disk be full for new files whose names contain `ending`."""
    real = io.open

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opening(file: object, mode: str = "r", *args: Any, **options: Any) -> object:
        if ("w" in mode or "x" in mode) and ending in os.fspath(file):  # type: ignore[call-overload]
            return Full(file, mode.replace("b", ""))  # type: ignore[arg-type]
        return real(file, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", opening)
    monkeypatch.setattr("builtins.open", opening)


@pytest.mark.parametrize(
    ("command", "ending", "named"),
    [
        ("gallery", "/thumbnails/", "thumbnails/node_0_train_"),
        ("gallery", "gallery.html", "gallery.html"),
        ("sheet", "a.png", "a.png"),
        ("sheet", "a.pdf", "a.pdf"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    ending: str,
    named: str,
) -> None:
    full(monkeypatch, ending)
    output = ["--output", str(tmp_path / ending)] if command == "sheet" else []
    result: Result = CliRunner().invoke(group, [command, "--input-dir", str(folder), *output])
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert named in result.stderr
    left = [path.name for path in (*tmp_path.iterdir(), *folder.rglob("*"))]
    assert [name for name in left if name.endswith(".tmp") or ending in name] == []


def test_a_link_in_place_of_a_file_is_replaced_and_what_it_leads_to_stays(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, n=1)
    out = tmp_path / "out"
    out.mkdir()
    victim = tmp_path / "victim"
    line = '{"file": "node_0_train_old_0_r5.png", "error": "of before"}'
    victim.write_text(f"secret\n{line}\n")
    names = ["node_0_train_dog_0_r5.png", "manifest.jsonl", "gallery.html"]
    for name in names:
        (out / name).symlink_to(victim)
    (tmp_path / "a.png").symlink_to(victim)
    (tmp_path / f".a.{os.getpid()}.tmp.png").symlink_to(victim)
    report = generate(store.select(), out, pipeline=FakePipeline(flux), **OPTIONS)
    assert report.done == 2
    make_gallery(out)
    save_sheet(arrange(ImageFolder.scan(out).select()), tmp_path / "a.png")
    assert victim.read_text() == f"secret\n{line}\n"
    assert not any((out / name).is_symlink() for name in names)
    assert not (tmp_path / "a.png").is_symlink()
    assert "secret" not in (out / "manifest.jsonl").read_text()
    # A manifest that was kept elsewhere goes on here.
    assert next(read_manifest(out))["error"] == "of before"
    assert len(list(read_manifest(out))) == 3


def test_a_link_in_place_of_the_claims_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".fedgfe-claims").symlink_to(tmp_path / "victim")
    with pytest.raises(ConflictError, match="expected a file, got a link"):
        Claims(tmp_path)
    assert not (tmp_path / "victim").exists()


def test_a_pipe_in_place_of_the_manifest_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(ConflictError, match="manifest.jsonl: expected a file"):
        Manifest(tmp_path)
    assert list(read_manifest(tmp_path)) == []


def test_a_linked_folder_is_written_to(flux: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    fill(store, node=0, round=5, n=1)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    report = generate(store.select(), tmp_path / "out", pipeline=FakePipeline(flux), **OPTIONS)
    assert report.done == len(png_names(tmp_path / "disk")) == 2
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a\nb", "a\0b"])
def test_an_experiments_name_chooses_no_folder_outside(tmp_path: Path, name: str) -> None:
    schema = Schema.flux(3, width=8, clip=(4,), granule=4, metadata=Metadata(experiment=name))
    store = EmbeddingStore.create(tmp_path / "received.zarr", schema)
    fill(store, node=0, round=5, n=1)
    for command in (["generate", "--model", "tiny"], ["status"], ["gallery"], ["sheet"]):
        result = CliRunner().invoke(group, ["--store", str(store.path), *command])
        assert result.exit_code == 1, result.output
        assert "experiment: expected a name that can be a folder's" in result.stderr


def test_a_sheet_lists_the_folder_once_and_reads_each_file_once(
    store: EmbeddingStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: Counter[str] = Counter()

    def counted(name: str) -> None:
        function = getattr(folder_module, name)

        def call(path: Path, *args: Any) -> Any:
            looks[path.name] += 1
            return function(path, *args)

        monkeypatch.setattr(folder_module, name, call)

    for name in ("png_names", "latest", "inspect_image"):
        counted(name)
    options = ["--input-dir", str(folder), "--output", str(tmp_path / "a.png"), "--round", "5"]
    result = CliRunner().invoke(group, ["--store", str(store.path), "sheet", *options])
    assert result.exit_code == 0, result.output
    # The folder is listed, and its manifests are read, which name some of its files.
    assert looks.pop(folder.name) == 2
    assert set(looks.values()) <= {1}
