"""Odd checkpoints: whatever is in one is one line, the others go on, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import re
import struct
import sys
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import legacy
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import find_checkpoints, import_checkpoints, read_checkpoint
from fedgfe_store.checkpoints.builders import Refused
from fedgfe_store.checkpoints.unpickler import Unpickler
from fedgfe_store.cli.main import group
from fedgfe_store.common.plain import Placeholder
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError

T5, CLIP = torch.ones(17, 4096), torch.ones(768)
_done: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in ("os.system", "exec", "subprocess.Popen", "import", "os.remove"):
        _done.append(event)


sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What was imported, run or removed."""
    global _watching
    unpickle(pickle.dumps("é", 0))  # imports a codec
    _done.clear()
    _watching = True
    yield _done
    _watching = False


class Color(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


class Attributes(dict[str, Any]):
    """A dict with attributes, as many configurations are."""


class Does:
    """Unpickles by a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def only(path: Path, **options: Any) -> Any:
    return import_checkpoints(path.parent / "s.zarr", path, **options).files[0]


def unpickle(data: bytes) -> Any:
    return Unpickler(io.BytesIO(data)).load()


# types that are harmless

HARMLESS: dict[str, tuple[Any, Any]] = {
    "defaultdict": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "ordered": (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2], 5), [1, 2]),
    "moment": (
        datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
        "2026-01-02 03:00:00+00:00",
    ),
    "date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "span": (datetime.timedelta(hours=1), "1:00:00"),
    "path": (pathlib.PurePosixPath("/data/audio"), "/data/audio"),
    "windows": (pathlib.PureWindowsPath("C:\\data"), "C:\\data"),
    "uuid": (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    "arguments": (argparse.Namespace(lr=0.5, names=["a"]), {"lr": 0.5, "names": ["a"]}),
    "attributes": (Attributes(lr=0.5), {"lr": 0.5}),
    "decimal": (decimal.Decimal("1.50"), "1.50"),
    "fraction": (fractions.Fraction(1, 3), "1/3"),
    "set": ({1, 2}, [1, 2]),
    "frozen": (frozenset([3]), [3]),
    "bytes": (b"ab", "b'ab'"),
    "number": (np.float32(0.5), 0.5),
    "array": (np.arange(3), [0, 1, 2]),
    "texts": (np.array(["dog", "cat"]), ["dog", "cat"]),
    "objects": (np.array(["dog", None], object), ["dog", None]),
    "big": (np.arange(2, dtype=">i4"), [0, 1]),
    "dtype": (torch.float32, "torch.float32"),
    "device": (torch.device("cuda", 1), "cuda:1"),
    "size": (torch.Size([2, 3]), [2, 3]),
    "enum": (Color.RED, f"<{__name__}.Color>"),
    "tuple": (Point(1, 2), f"<{__name__}.Point>"),
    "class": (Color, f"{__name__}.Color"),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_types_are_read_and_unknown_ones_named(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    value = legacy.content([legacy.entry(T5, CLIP)])
    value["metadata"] |= {name: given for name, (given, _) in HARMLESS.items()}
    path = legacy.save(
        tmp_path, value, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )
    checkpoint = read_checkpoint(path)
    found = {name: checkpoint.metadata[name] for name in HARMLESS}
    assert found == {name: expected for name, (_, expected) in HARMLESS.items()}
    assert sorted(note.split(":")[0] for note in checkpoint.notes) == [
        f"{__name__}.{name}" for name in ("Attributes", "Color", "Point")
    ]
    (entry,) = checkpoint.entries
    assert entry.t5 is not None
    assert torch.equal(entry.t5, T5)


def test_odd_containers_of_entries(tmp_path: Path) -> None:
    value = Attributes(legacy.content([Attributes(legacy.entry(T5, CLIP, i)) for i in range(2)]))
    value["embeddings"] = collections.deque(value["embeddings"])
    value["metadata"] = argparse.Namespace(diffusion_type="flux", selected_classes=("dog",))
    path = legacy.save(tmp_path, value)
    assert only(path).records == 2
    assert EmbeddingStore.open(tmp_path / "s.zarr").schema.metadata.classes == ("dog",)


def test_identities_of_odd_types_are_text(tmp_path: Path) -> None:
    details = {"sample_id": uuid.UUID(int=5), "audio_path": pathlib.PurePosixPath("/a/b.wav")}
    image = pathlib.PurePosixPath("/x/output_images/run/a.png")
    made = legacy.entry(
        T5, CLIP, sample_metadata=details, image_path=image, image_filename=None, when=Color.RED
    )
    only(legacy.save(tmp_path, legacy.content([made])))
    row = EmbeddingStore.open(tmp_path / "s.zarr").select().records.iloc[0]
    assert row["sample_id"] == "00000000-0000-0000-0000-000000000005"
    assert (row["audio_path"], row["image_filename"]) == ("/a/b.wav", "a.png")
    assert json.loads(row["extra"])["when"] == f"<{__name__}.Color>"


def test_a_file_of_an_unknown_class_says_what_to_do(tmp_path: Path) -> None:
    path = legacy.save(tmp_path, Color.RED)
    wanted = rf"got <{__name__}\.Color>: load it where it was written and `torch.save` a dict"
    with pytest.raises(SchemaMismatchError, match=wanted):
        read_checkpoint(path)


def test_tensors_of_unknown_kinds_are_left_out_with_their_name(tmp_path: Path) -> None:
    given = [T5.to_sparse(), Color.RED, np.ones((17, 4096), np.float16), T5.expand(1, 17, 4096)]
    entries = [legacy.entry(value, CLIP, i) for i, value in enumerate(given)]
    report = only(legacy.save(tmp_path, legacy.content(entries)))
    assert report.records == 2
    assert report.skipped == {
        "t5_embedding is <torch._utils._rebuild_sparse_tensor>, not a tensor": 1,
        f"t5_embedding is <{__name__}.Color>, not a tensor": 1,
    }


# nothing is run

CALLS = [
    (os.system, "echo"),
    (eval, "1 + 1"),
    (exec, "x = 1"),
    (__import__, "this"),
    (getattr, str, "join"),
    (setattr, Color, "x", 1),
    (map, eval, ["1"]),
    (os.remove, "nothing"),
    (pickle.loads, b"N."),
    (np.load, "nothing"),
    (torch.load, "nothing"),
    (bytearray, 10**11),
    (bytes, 10**11),
    (list, range(10**11)),
    (fractions.Fraction, "1e999999999"),
    (itertools.repeat, 1),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_become_names(watched: list[str], protocol: int) -> None:
    for function, *arguments in CALLS:
        data = pickle.dumps({"x": Does(function, *arguments)}, protocol)
        watched.clear()
        try:
            found = unpickle(data)["x"]
        except Refused:
            found = []
        assert isinstance(found, Placeholder) or found == []
        assert watched == []


OPCODES = {
    "a function changed": (b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.", "_rebuild"),
    "attributes set": (b"cos\nsystem\n)\x81N}X\1\0\0\0aK\1s\x86b.", "<os.system>"),
    "what getattr gave called": (
        b"cbuiltins\ngetattr\ncbuiltins\nstr\nX\4\0\0\0join\x86RX\1\0\0\0a\x85R.",
        "<builtins.str.join>",
    ),
    "old instances": (b"(S'id'\nios\nsystem\n.", "<os.system>"),
    "old objects": (b"(cos\nsystem\nS'id'\no.", "<os.system>"),
    "a reconstructor": (
        b"ccopyreg\n_reconstructor\ncos\nsystem\ncbuiltins\nobject\nN\x87R.",
        "<os.system>",
    ),
    "terminal codes in a name": (
        b"\x80\x04\x8c\x03\x1b[Ac\x8c\x01x\x93)R.".replace(b"\x03\x1b[Ac", b"\x03\x1b[A"),
        "<\\x1b[A.x>",
    ),
}


@pytest.mark.parametrize("what", OPCODES)
def test_instructions_that_run_something_give_names(watched: list[str], what: str) -> None:
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    data, expected = OPCODES[what]
    assert expected in str(unpickle(data))
    assert vars(torch._utils._rebuild_tensor_v2) == before
    assert watched == []


HUGE = struct.pack("<Q", 2**40)
BOMBS = {
    "a key that takes forever to hash": b"})" + b"2\x86" * 60 + b"K\1s.",
    "a set of it": b"\x80\x04()" + b"2\x86" * 60 + b"\x91.",
    "copies of copies": b"]("
    + b"N" * 1000
    + b"e\x94("
    + b"cbuiltins\nlist\nh\0\x85R" * 25000
    + b"l.",
    "an array that is longer than its bytes": b"cnumpy._core.multiarray\n_reconstruct\n)R(K\1"
    b"K\5\x85cnumpy\ndtype\nX\2\0\0\0f8\x85R\x89B\x08\0\0\x0000000000tb.",
    "a text array of no text": b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0U1\x85R"
    b"C\4\xff\xff\xff\xff\x86R.",
    "an extension": b"\x80\x02\x82\1.",
    "a buffer": b"\x80\5\x97.",
    "items for a number": b"K\1K\1a.",
    "items for a list": b"]K\1K\1s.",
    "a tensor outside": b"K\1Q.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_refused(what: str) -> None:
    with pytest.raises(Refused):
        unpickle(BOMBS[what])


@pytest.mark.parametrize("data", [b"\x80\5\x96" + HUGE + b".", b"\x80\4\x8e" + HUGE + b"."])
def test_lengths_beyond_the_file_ask_for_no_memory(data: bytes) -> None:
    with pytest.raises(EOFError):
        unpickle(data)


def test_changed_instructions_run_nothing(watched: list[str]) -> None:
    values = {name: given for name, (given, _) in HARMLESS.items()}
    whole = [pickle.dumps(values, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for pickled in whole:
        unpickle(pickled)
    dice = random.Random(0)
    for _ in range(3000):
        data = bytearray(dice.choice(whole))
        for _ in range(2):
            at = dice.randrange(len(data))
            data[at] = dice.choice(b"Rboaseu(.]})2\x81\x8f\x90\x91\x92\x93") if at % 2 else at % 256
        watched.clear()
        try:
            unpickle(bytes(data))
        except Exception as error:  # noqa: BLE001 - any: the file counts as damaged
            assert not isinstance(error, (MemoryError, RecursionError, SystemError))
        assert watched == []


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, CLIP)]))
    legacy.rewrite_pickle(path, lambda data: data.replace(b"M\x00\x10\x86", b"M\x00\x20\x86", 1))
    with pytest.raises(SchemaMismatchError, match="a tensor that is larger than its storage"):
        read_checkpoint(path)


# values that are not what they should be


def looped() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def doubled() -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(60):
        value = (value, value)
    return value


ODD = [
    None, True, 10**5000, -(10**5000), 2**70, float("nan"), float("inf"), "", "\0", "\ud800",
    "\ufffd", "x" * 10**6, b"\xff", looped(), doubled(), {}, {"a": {3: 10**5000}}, [1], {1},
    torch.ones(2), torch.tensor(float("nan")), np.array([1.0, 2.0]), np.array([[1, 2]]),
    np.float64("nan"), Color.RED, Color, datetime.datetime.max, 1j, range(3),
]  # fmt: skip
TOP = ["node_id", "round", "timestamp", "embeddings", "metadata"]
INNER = [
    "split", "index", "class_name", "image_path", "image_filename", "t5_embedding",
    "clip_embedding", "sample_metadata", "audio_embeddings", "node_id", "other",
]  # fmt: skip


@pytest.mark.parametrize("key", TOP)
def test_odd_values_at_the_top(tmp_path: Path, key: str) -> None:
    for number, odd in enumerate(ODD):
        value = legacy.content([legacy.entry(T5, CLIP)], **{key: odd})
        legacy.save(tmp_path / "c", value, f"{number}.pt")
    legacy.node_file(tmp_path / "c", 7, n=1)
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "c", "--dry-run")
    assert result.exit_code in (0, 3)
    for line in result.output.splitlines():
        assert len(line) < 2000
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path / "c", if_exists="replace")
    assert report.files[-1].error is None
    assert all("\n" not in (file.error or "") for file in report.files)


def test_odd_values_of_text_caches(tmp_path: Path) -> None:
    for number, odd in enumerate(ODD):
        for kind in ("flux", "sd"):
            name = f"{kind}_{number}_text_embs_dict.pt"
            legacy.save(tmp_path / "c", {"dog": {kind: odd}, number: {kind: {"t5": odd}}}, name)
    legacy.node_file(tmp_path / "c", n=1)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path / "c")
    assert report.records == 1
    assert [file.error for file in report.files] == [None] * len(report.files)


@pytest.mark.slow
def test_odd_values_of_entries(tmp_path: Path) -> None:
    good = legacy.entry(T5, CLIP, 0, class_name="good")
    odd = [
        legacy.entry(T5, CLIP, 1 + i) | {key: value} for key in INNER for i, value in enumerate(ODD)
    ]
    path = legacy.save(tmp_path, legacy.content([*odd, *ODD, good]))
    report = only(path, audio=True)
    assert report.error is None
    assert report.classes["good"] == 1
    assert sum(report.skipped.values()) + report.records == len(odd) + len(ODD) + 1
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.verify().sound
    assert max(len(text.encode()) for text in store.select().records["extra"]) < 2**16
    result = run("--store", tmp_path / "other.zarr", "import", path)
    assert result.exit_code == 3
    assert all(len(line) < 3000 for line in result.output.splitlines()[3:])


def test_stacks_that_repeat_one_row_are_left_out(tmp_path: Path) -> None:
    many = torch.ones(1, 17, 4096).expand(10**9, 17, 4096)
    entries = [legacy.stack(many, None), legacy.stack(T5[None], CLIP[None], class_name="cat")]
    value = legacy.content([], "server")
    value["embeddings"] = entries
    report = only(legacy.save(tmp_path, value))
    assert report.classes == {"cat": 1}
    (reason,) = report.skipped
    assert re.fullmatch(r"t5 repeats its values to [\d,]+ bytes", reason)


TIMES = [
    "9999-12-31T23:59:59.999999",
    253402300799.9999,
    "0001-01-01T00:00:00+14:00",
    "1600-01-01T00:00:00",
    "2300-01-01T00:00:00",
    1e300,
    datetime.datetime.max,
]


@pytest.mark.parametrize("when", TIMES)
def test_a_time_that_cannot_be_kept_is_left_out_with_a_note(tmp_path: Path, when: Any) -> None:
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, CLIP)], timestamp=when))
    report = only(path)
    assert (report.records, report.error) == (1, None)
    (note,) = report.notes
    assert re.match("timestamp .* is not .*: left out", note)
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    changed = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    assert abs(store.select().records["timestamp"].iloc[0] - changed).total_seconds() < 1


def test_a_file_that_was_changed_at_a_time_that_cannot_be_kept(tmp_path: Path) -> None:
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, CLIP)], timestamp=None))
    os.utime(path, (0, 10_000_000_000))
    if path.stat().st_mtime != 10_000_000_000:
        pytest.skip("this file system does not keep such a time")
    assert only(path).records == 1
    when = EmbeddingStore.open(tmp_path / "s.zarr").select().records["timestamp"].iloc[0]
    assert when.year < 2262


# files that are something else


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


SIGNS = {
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "annex.pt": (b"/annex/objects/SHA256E-s1--0.pt\n", "run `git annex get`"),
    "json.pt": (b'{"a": 1}', "a JSON text"),
    "tensors.pt": (struct.pack("<Q", 30) + b'{"__metadata__":{}}', "a safetensors file"),
    "npy.pt": (b"\x93NUMPY\1\0", "a NumPy .npy file"),
    "hdf.pt": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "gzip.pt": (b"\x1f\x8b\x08\0", "packed with gzip: unpack it first"),
    "empty.pt": (b"", "empty file"),
    "head.pt": (b"PK\3\4", "cut short or damaged"),
    "pickle.pt": (b"\x80", "cut short or damaged"),
    "text.pt": (b"hello", "not a file written by torch.save"),
}


def test_what_is_no_checkpoint_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    legacy.node_file(folder, 0, n=1)
    for name, (data, _) in SIGNS.items():
        (folder / name).write_bytes(data)
    np.savez(folder / "arrays.npz", a=np.ones(3))
    (folder / "arrays.npz").rename(folder / "npz.pt")
    zipped(folder / "packed.pt", **{"run/node_0_embeddings_r5.pt": b"x"})
    zipped(folder / "other.pt", **{"readme.txt": b"x"})
    (folder / "dangling.pt").symlink_to("nowhere.pt")
    os.mkfifo(folder / "pipe.pt")
    result = run("--store", tmp_path / "s.zarr", "import", folder)
    assert result.exit_code == 3
    failed = dict(re.findall(r"^failed: .*/(\S+\.pt): (.*)$", result.stderr, re.MULTILINE))
    expected = {name: says for name, (_, says) in SIGNS.items()} | {
        "npz.pt": "a NumPy .npz archive, not a checkpoint",
        "packed.pt": "a zip archive with 'run/node_0_embeddings_r5.pt' in it: unzip it",
        "other.pt": "a zip archive that torch.save did not write",
        "dangling.pt": "a link to a file that is not there",
        "pipe.pt": "expected a regular file, got a named pipe",
    }
    assert failed.keys() == expected.keys()
    for name, says in expected.items():
        assert says in failed[name]
    assert "1 new records" in result.output


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_does_not_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "node_0_embeddings_r5.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(DamagedDataError, match=f"expected a regular file, got a .*{kind}"):
        read_checkpoint(path)


@pytest.mark.parametrize("ledger", [b"[" * 100_000, b'{"file": []}', b'{"file": 1, "content": 2}'])
def test_a_strange_ledger_only_costs_reading_the_files_again(tmp_path: Path, ledger: bytes) -> None:
    legacy.node_file(tmp_path, n=1)
    import_checkpoints(tmp_path / "s.zarr", tmp_path)
    (tmp_path / ".s.zarr.imported").write_bytes(ledger + b"\n")
    (report,) = import_checkpoints(tmp_path / "s.zarr", tmp_path, new_only=True).files
    assert (report.unchanged, report.known) == (1, False)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_ledger_that_is_no_file_does_not_hang(tmp_path: Path, make: Any) -> None:
    legacy.node_file(tmp_path, n=1)
    make(tmp_path / ".s.zarr.imported")
    for records in (1, 0):
        (report,) = import_checkpoints(tmp_path / "s.zarr", tmp_path, new_only=True).files
        assert (report.records, report.known) == (records, False)


def test_names_of_another_case_are_told(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path, n=1)
    other = tmp_path / "node_1_embeddings_r5.PT"
    other.write_bytes(b"")
    if len(list(tmp_path.iterdir())) < 2 or find_checkpoints(tmp_path) != [path]:
        pytest.skip("this file system does not tell cases apart")
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path)
    assert "1 file by a name of another case left out: node_1_embeddings_r5.PT" in result.stderr
    path.unlink()
    with pytest.raises(NotFoundError, match="node_1_embeddings_r5.PT"):
        find_checkpoints(tmp_path)


def test_checkpoints_in_the_folders_of_a_folder_are_hinted_at(tmp_path: Path) -> None:
    legacy.node_file(tmp_path / "checkpoints" / "embeddings", n=1)
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "checkpoints")
    assert result.exit_code == 1
    assert "no file matches '*.pt' (but in its folders embeddings: name one)" in result.stderr
    for number in range(1, 6):
        legacy.node_file(tmp_path / "project" / "embeddings" / f"run{number}", n=1)
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "project")
    folders = ", ".join(f"embeddings/run{number}" for number in range(1, 5))
    assert f"(but in its folders {folders} and 1 more: name one)" in result.stderr


@pytest.mark.parametrize("pattern", ["", "/x*.pt"])
def test_a_pattern_that_is_none(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(SchemaMismatchError, match="pattern: expected one of file names"):
        find_checkpoints(tmp_path, pattern=pattern)


def test_file_names_with_signs_that_are_digits_only_in_part(tmp_path: Path) -> None:
    names = ["1²3.pt", "²_r1.pt", "r10.pt", "r2.pt"]
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in find_checkpoints(tmp_path)} == set(names)
