"""Stores that were made to harm: what they claim is looked at before it is believed, or opened."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from conftest import SMALL, fill
from numcodecs.zstd import Zstd
from places import DATA

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError, SchemaMismatchError
from fedgfe_store.schema import FORMAT_VERSION
from fedgfe_store.storage.arrays import checked_arrays
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.files import read_regular
from fedgfe_store.storage.key_files import unpacked
from fedgfe_store.storage.layout import array_metadata, key_columns
from fedgfe_store.storage.metadata import check_point, parsed_group

COLUMNS = key_columns(SMALL)


def sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def put_socket(file: Path) -> None:
    here = os.open(file.parent, os.O_RDONLY)  # a socket's path may have a hundred bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{here}/{file.name}")
    os.close(here)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "null": lambda file: file.symlink_to("/dev/null"),
    "socket": put_socket,
    "loop": lambda file: file.symlink_to(file.name),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_file_in_the_place_of_a_tensor_file_is_damage(store, kind):
    fill(store, node=0, round=1)
    file = store.path / "t5" / "c.0.0.0"
    file.unlink()
    ODD_FILES[kind](file)
    opened = EmbeddingStore.open(store.path)
    with pytest.raises(DamagedDataError, match="t5 of node 0, .* index 0 is not .*c.0.0.0"):
        opened.select().read("t5")
    assert opened.select().take([4, 5]).read("t5").shape == (2, 3, 8)
    assert len(opened.verify().damaged) == 4


def test_a_file_in_the_place_of_a_column_is_damage(store):
    fill(store, node=0, round=1)
    for file in (store.path / "t5").iterdir():
        file.unlink()
    (store.path / "t5").rmdir()
    (store.path / "t5").write_bytes(b"")
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1"):
        EmbeddingStore.open(store.path).select().read("t5")


def test_a_link_to_a_file_is_read(store, tmp_path):
    fill(store, node=0, round=1)
    before = store.select().read("t5")
    (store.path / "t5" / "c.0.0.0").rename(tmp_path / "elsewhere")
    (store.path / "t5" / "c.0.0.0").symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(EmbeddingStore.open(store.path).select().read("t5"), before)


@pytest.mark.parametrize("kind", ODD_FILES)
def test_only_ordinary_files_are_read_whole(tmp_path, kind):
    ODD_FILES[kind](tmp_path / "file")
    with pytest.raises(UnreadableError, match="it is no ordinary file"):
        read_regular(tmp_path / "file", 100)


def test_a_file_is_read_up_to_a_length(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_regular(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(UnreadableError, match="expected at most 99 bytes, got 100"):
        read_regular(tmp_path / "file", 99)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_regular(tmp_path / "nothing", 99)
    os.truncate(tmp_path / "file", 2**42)
    with pytest.raises(UnreadableError, match="expected at most"):
        read_regular(tmp_path / "file", 2**32)


def test_an_index_that_points_at_a_hole_of_terabytes_is_damage(store):
    fill(store, node=0, round=1)
    file = store.path / "t5" / "c.0.0.0"
    index = np.array([(0, 2**42)], "<u8").tobytes()
    os.truncate(file, 2**42)
    with file.open("ab") as opened:
        opened.write(sealed(index))
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1") as error:
        EmbeddingStore.open(store.path).select().read("t5")
    assert "another size" in str(error.value.__cause__)


def frame(size: int | None, *blocks: bytes) -> bytes:
    """A zstd frame that says that it becomes `size` bytes, or says nothing."""
    if size is None:
        return b"\x28\xb5\x2f\xfd" + b"\0\x70" + b"".join(blocks)
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + size.to_bytes(8, "little") + b"".join(blocks)


def block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


def packed(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def raw(data: bytes) -> bytes:
    """A zstd frame, of blocks as they are, that does not say how long they are."""
    parts = [data[start : start + 2**17] for start in range(0, len(data), 2**17)]
    blocks = (block(0, len(p), p, last=p is parts[-1]) for p in parts)
    return frame(None, *blocks)


def test_frames_with_and_without_a_size_are_unpacked():
    numbers = np.arange(16384, dtype="<i4").tobytes()
    for data in (Zstd(level=1).encode(numbers), raw(numbers)):
        assert unpacked(COLUMNS["round"], packed(data)) == numbers
    texts = b"\0\x40\0\0" + b"\x03\0\0\0abc" * 16384
    for data in (Zstd(level=1).encode(texts), raw(texts)):
        assert unpacked(COLUMNS["node"], packed(data)) == texts


def test_the_same_long_note_in_every_row_is_unpacked():
    texts = b"\0\x40\0\0" + (b"\xa0\x0f\0\0" + b"x" * 4000) * 16384
    assert unpacked(COLUMNS["extra"], packed(Zstd(level=1).encode(texts))) == texts


BOMB = block(1, 2**17, b"a") * 15_000
HOSTILE = {
    "a size of 2**40": frame(2**40, block(0, 1, b"a", last=True)),
    "a size of 2**64": frame(2**64 - 1, block(0, 1, b"a", last=True)),
    "a bomb that says so": frame(15_000 * 2**17 + 1, BOMB, block(0, 1, b"a", last=True)),
    "a bomb that does not": frame(None, BOMB, block(0, 1, b"a", last=True)),
    "a bomb without an end": frame(None, BOMB),
    "nothing": b"",
    "no frame": b"abcdefghijklmnop",
    "half a header": b"\x28\xb5\x2f\xfd\xe0\0\0",
    "a frame to be skipped": b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    "a small size": frame(3, block(0, 3, b"abc", last=True)),
}


@pytest.mark.parametrize("name", ["round", "index", "row_digest", "class_name", "extra"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_frames_that_claim_too_much_are_not_unpacked(kind, name, monkeypatch):
    if name in ("class_name", "extra") and kind == "a small size":
        assert unpacked(COLUMNS[name], packed(HOSTILE[kind])) == b"abc"  # its count is not right
        return
    given: list[Any] = []
    real = Zstd.decode

    def decode(self: Zstd, buf: Any, out: Any) -> Any:
        given.append(out)
        return real(self, buf, out)

    monkeypatch.setattr(Zstd, "decode", decode)
    with pytest.raises((UnreadableError, RuntimeError)):
        unpacked(COLUMNS[name], packed(HOSTILE[kind]))
    assert all(len(out) == 16384 * COLUMNS[name].stored.itemsize for out in given)


def test_flipped_bits_of_a_frame_are_an_error_or_the_same_length():
    numbers = np.random.default_rng(0).integers(0, 9, 16384).astype("<i4").tobytes()
    good, rng = Zstd(level=1).encode(numbers), np.random.default_rng(1)
    for place in [*range(16), *rng.integers(16, len(good), 100)]:
        data = bytearray(good)
        data[place] ^= 1 << rng.integers(8)
        with contextlib.suppress(ValueError, RuntimeError):
            assert len(unpacked(COLUMNS["round"], packed(bytes(data)))) == len(numbers)


POINT = {"commit": 3, "records": 8, "live": 6, "compacted": 2}


def checked(point=None, change=lambda arrays: None, schema: Schema = SMALL) -> None:
    arrays = json.loads(json.dumps(array_metadata(schema)))
    change(arrays)
    check_point(schema, POINT | (point or {}))
    checked_arrays(schema, FORMAT_VERSION, arrays)


def test_what_a_writer_left_passes(store):
    checked()
    checked({"commit": 0, "records": 0, "live": 0, "compacted": 0})
    fill(store, node=0, round=1)
    for path in (store.path, DATA / "version1.zarr"):
        document = parsed_group((path / "zarr.json").read_bytes())
        ours = document["attributes"]["fedgfe_store"]
        schema = Schema.from_json(ours)
        arrays = document["consolidated_metadata"]["metadata"]
        check_point(schema, ours["commit_point"])
        checked_arrays(schema, ours["version"], arrays)


ODD = [True, 1.0, "1", None, [1], {}, -1, 2**40 + 4, 10**5000]


@pytest.mark.parametrize("name", POINT)
@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_a_commit_point_is_of_whole_numbers_within_bounds(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected|live: expected"):
        checked({name: value})


@pytest.mark.parametrize(
    "point",
    [
        {"records": 7},
        {"live": 9},
        {"compacted": 4},
        {"commit": 2**31 - 1},
        {"commit": 0, "compacted": 0},
    ],
    ids=str,
)
def test_a_commit_point_fits_together(point):
    with pytest.raises(ValueError, match="expected"):
        checked(point)


def inside(metadata: dict, path: str) -> tuple[dict, object]:
    """The place in an array's metadata that `path` leads to."""
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in way:
        metadata = metadata[step]
    return metadata, last


SHARDING = "codecs/0/configuration"
PLACES: dict[str, list[Any]] = {
    "chunk_grid/configuration/chunk_shape/0": [True, 0, -4, 8, 2**40, "4", None, 4.0, [4]],
    "chunk_grid/configuration/chunk_shape/1": [True, 0, 2**40, "3"],
    f"{SHARDING}/chunk_shape/0": [True, 0, -1, 3, 2**40, "4", None, 0.5, {}],
    f"{SHARDING}/chunk_shape/1": [4, None],
    f"{SHARDING}/codecs/1/configuration/clevel": [-1, 10, "5", None, True],
    f"{SHARDING}/codecs/1/configuration/cname": ["rar", None, 5, []],
    f"{SHARDING}/codecs/1/configuration/shuffle": ["bits", None, 2, []],
    f"{SHARDING}/codecs/1/configuration/typesize": [2**40, "4"],
    f"{SHARDING}/codecs/1/configuration/blocksize": [2**40, -1],
    SHARDING: [None, [], 5],
    "codecs": [None, [], {}],
    "chunk_grid": [None, [], 5],
    "shape": [None, [], 5, ["0", 3, 8], [0, 3], [0, 3, 9], [True, 3, 8]],
    "dimension_names": [None, [], ["record"], ["commit", "token", "t5_feature"]],
    "data_type": [None, "float64"],
}


@pytest.mark.parametrize("path", PLACES)
def test_metadata_of_arrays_is_what_a_writer_leaves(path):
    for value in PLACES[path]:

        def change(arrays, value=value):
            where, last = inside(arrays["t5"], path)
            where[last] = value

        with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
            checked(change=change)


def test_key_columns_have_their_types_and_axes():
    for name in ("round", "commit_time"):
        for key, value in {"shape": [0, 3], "data_type": "int8", "dimension_names": ["x"]}.items():
            with pytest.raises(ValueError, match=f"{name}: expected"):
                checked(change=lambda arrays, n=name, k=key, v=value: arrays[n].update({k: v}))
    with pytest.raises(ValueError, match="node: expected an object"):
        checked(change=lambda arrays: arrays.update(node=[]))


def values_in(data, path=()):
    """The paths to all values in JSON."""
    if not isinstance(data, dict | list):
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        yield from values_in(value, (*path, key))


def test_a_schema_of_any_json_is_one_or_an_error_of_few_kinds():
    good = Schema.flux(3, width=8, clip=(4,), audio=(2, 5)).to_json()
    good = json.loads(json.dumps(good))
    odd: list[Any] = [None, True, 0, -1, 2**70, 10**5000, 0.5, "x", "\ud800", "a\0", [], {}, [[]]]
    for path in values_in(good):
        for value in odd:
            changed = deepcopy(good)
            where = changed
            for step in path[:-1]:
                where = where[step]
            where[path[-1]] = value
            try:
                schema = Schema.from_json(changed)
            except (SchemaMismatchError, TypeError, KeyError):
                continue
            assert schema.record_nbytes < 2**33
            json.dumps(schema.to_json())


def test_a_group_file_of_any_text_is_an_object_or_an_error():
    assert parsed_group(b'{"a": 1}') == {"a": 1}
    for text in (b"", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000):
        with pytest.raises(ValueError, match="too deep|an object|Exp|Exceeds|decode"):
            parsed_group(text)
