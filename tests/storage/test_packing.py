"""Chunks that blosc packs: the same as numcodecs', and unpacked or refused whatever is in them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, fill
from numcodecs.blosc import Blosc
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage import packing as package
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.packing import SHUFFLES, Packing, decode

VALUES = np.random.default_rng(0).normal(0, 0.1, (3, 1000)).astype(np.float32)
GUARD = 64


@pytest.fixture(params=["python-blosc", "numcodecs"], autouse=True)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which build of blosc does it."""
    if request.param == "numcodecs":
        monkeypatch.setattr(package, "_library", lambda: None)
    else:
        pytest.importorskip("blosc")
    return request.param


def unpacked(chunk: bytes, nbytes: int) -> bytes:
    """Unpack between two guards, which have to stay as they are."""
    memory = np.full(nbytes + 2 * GUARD, 0xA5, np.uint8)
    try:
        decode(chunk, memory[GUARD:-GUARD].data)
    finally:
        assert (memory[:GUARD] == 0xA5).all()
        assert (memory[-GUARD:] == 0xA5).all()
    return memory[GUARD:-GUARD].tobytes()


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("cname", ["lz4", "lz4hc", "blosclz", "zlib", "zstd"])
def test_chunks_are_those_of_numcodecs(cname: str, shuffle: str) -> None:
    for options in ((5, 0, 4), (0, 0, 4), (9, 0, 255), (1, 512, 4), (5, 0, 1)):
        clevel, blocksize, typesize = options
        given: dict[str, Any] = {"cname": cname, "clevel": clevel, "blocksize": blocksize}
        packing = Packing.of({**given, "shuffle": shuffle, "typesize": typesize})
        theirs = Blosc(**given, shuffle=SHUFFLES[shuffle], typesize=typesize)
        chunk = packing.encode(VALUES)
        assert chunk == theirs.encode(VALUES)
        assert unpacked(chunk, VALUES.nbytes) == VALUES.tobytes() == theirs.decode(chunk)


@pytest.mark.parametrize("cname", ["lz4", "blosclz", "zstd"])
def test_a_damaged_chunk_is_an_error_or_as_long_as_it_was(cname: str) -> None:
    packing = Packing.of(
        {"cname": cname, "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0, "typesize": 4}
    )
    chunk, rng = packing.encode(VALUES), np.random.default_rng(1)
    places = [*range(64), *rng.integers(64, len(chunk), 300).tolist()]
    refused = 0
    for place in places:
        for bits in (0x01, 0x80, 0xFF):
            damaged = bytearray(chunk)
            damaged[place] ^= bits
            try:
                unpacked(bytes(damaged), VALUES.nbytes)
            except UnreadableError:
                refused += 1
    assert refused > 60
    for _ in range(300):
        random = chunk[:16] + rng.bytes(len(chunk) - 16)
        with pytest.raises(UnreadableError):
            unpacked(random, VALUES.nbytes)


def test_a_chunk_of_another_size_is_not_unpacked() -> None:
    chunk = Packing("lz4", 5, 2, 0, 4).encode(VALUES)
    for nbytes in (0, 4, VALUES.nbytes - 1, VALUES.nbytes + 1):
        with pytest.raises(UnreadableError, match="another size"):
            unpacked(chunk, nbytes)
    for cut in (0, 1, 15, 16, len(chunk) - 1):
        with pytest.raises(UnreadableError, match="another size"):
            unpacked(chunk[:cut], VALUES.nbytes)
    with pytest.raises(UnreadableError, match="another size"):
        unpacked(chunk + b"\0", VALUES.nbytes)


def test_damage_that_only_a_digest_tells_names_the_record(store: EmbeddingStore) -> None:
    """Bytes of a chunk are changed behind blosc's back, and the chunk's checksum is not asked."""
    fill(store, node=3, round=9, classes="dog", n=1)
    file = store.path / "t5" / "c.0.0.0"
    good = file.read_bytes()
    assert SMALL.compression == "bitshuffle"
    expected = EmbeddingStore.open(store.path).select().read("t5")
    outcomes = {"named": 0, "same": 0}
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10
        file.write_bytes(bad)
        again = EmbeddingStore.open(store.path)
        try:
            read = again.select().read("t5")
        except DamagedDataError as error:
            assert "t5 of node 3, round 9, split train, class dog, index" in str(error)
            outcomes["named"] += 1
        else:  # the checksum, or what blosc does not look at
            assert np.array_equal(read, expected)
            outcomes["same"] += 1
            assert not again.verify().sound
    assert outcomes["named"] > outcomes["same"] > 3


def test_a_program_that_uses_blosc_itself_reads(store: EmbeddingStore, build: str) -> None:
    if build == "numcodecs":
        return
    fill(store, node=0, round=1)
    expected = store.select().read("t5")
    code = f"""
import pathlib
from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import DamagedDataError
first = EmbeddingStore.open({str(store.path)!r}).select().read("t5")
import blosc
assert blosc.blosc_extension.error is blosc.toplevel._ext.error
blosc.set_nthreads(3)
blosc.set_releasegil(False)
second = EmbeddingStore.open({str(store.path)!r}).select().read("t5")
assert blosc.unpack_array(blosc.pack_array(second)).tobytes() == second.tobytes()
assert first.tobytes() == second.tobytes() == bytes.fromhex({expected.tobytes().hex()!r})
file = pathlib.Path({str(store.path / "t5" / "c.0.0.0")!r})
file.write_bytes(file.read_bytes()[:20] + bytes(40) + file.read_bytes()[60:])
try:
    EmbeddingStore.open({str(store.path)!r}).select().read("t5")
except DamagedDataError:
    pass
else:
    raise AssertionError("zeros were read")
"""
    assert finished([sys.executable, "-c", code]).returncode == 0
