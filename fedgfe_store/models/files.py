"""The files of a model's folder, which anybody may have written: configurations and weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import xxhash

from fedgfe_store.errors import NotFoundError, SchemaMismatchError

FP16 = "fp16"
"""The variant of weight files that is taken where there are no others."""

_LARGEST_JSON = 64 * 2**20
# What safetensors itself allows a header to be.
_LARGEST_HEADER = 100_000_000
_LARGEST_NUMBER = 2**31
_POINTER = b"version https://git-lfs.github.com/"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Weights:
    """The safetensors files that a part's weights are loaded from.

    Parameters
    ----------
    files : tuple of Path
        The files; none if any is missing.
    variant : str or None
        ``"fp16"`` where only files of that variant are there.
    """

    files: tuple[Path, ...] = ()
    variant: str | None = None

    def parameters(self) -> int:
        """Count the numbers in them.

        Raises
        ------
        SchemaMismatchError
            If a file is not whole.
        """
        sizes = (size for file in self.files for size in _tensor_sizes(file))
        return sum(length // _ITEM_BYTES.get(dtype, 4) for dtype, length in sizes)


def find_weights(folder: Path, stem: str) -> Weights:
    """Find a part's weights, one file or several that an index lists.

    Parameters
    ----------
    folder : Path
        Folder of the part.
    stem : str
        What the files' names begin with.

    Raises
    ------
    SchemaMismatchError
        If the index is none.
    """
    for variant in (None, FP16):
        infix = f".{variant}" if variant else ""
        index = folder / f"{stem}.safetensors.index{infix}.json"
        names = {f"{stem}{infix}.safetensors"}
        if index.is_file():
            names = _listed(index)
        files = tuple(folder / name for name in sorted(names))
        if all(file.is_file() for file in files):
            return Weights(files, variant)
    return Weights()


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises
    ------
    NotFoundError
        If there is no such file.
    SchemaMismatchError
        If it holds no JSON object.
    """
    if not path.is_file():
        other = "something else" if path.exists() else "none"
        raise NotFoundError(f"model: expected a file {path}, got {other}")
    with path.open("rb") as file:
        data = file.read(_LARGEST_JSON)
    if data.startswith(_POINTER):
        raise SchemaMismatchError(f"model: expected JSON in {path}, got {_POINTED_AT}")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SchemaMismatchError(f"model: expected JSON in {path}, got {error}") from None
    if not isinstance(content, dict):
        raise SchemaMismatchError(
            f"model: expected a JSON object in {path}, got {type(content).__name__}"
        )
    return content


def check_number(config: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> None:
    """Refuse a configuration in which a key is no whole number of a plausible size."""
    _check(_is_whole(config.get(key), least), "a whole number", config, key, where)


def check_numbers(config: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a configuration in which a key is no list of whole numbers."""
    found = config.get(key)
    fits = isinstance(found, list) and bool(found) and all(_is_whole(n, 1) for n in found)
    _check(fits, "a list of whole numbers", config, key, where)


def check_real(config: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a configuration in which a key is no number."""
    found = config.get(key)
    fits = isinstance(found, int | float) and not isinstance(found, bool)
    _check(fits and abs(found) < float("inf"), "a number", config, key, where)  # type: ignore[arg-type]


def check_truth(config: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a configuration in which a key is neither true nor false."""
    _check(isinstance(config.get(key), bool), "true or false", config, key, where)


def digest_files(folder: Path, parts: tuple[str, ...]) -> str:
    """Hash sizes and samples of all files in some parts of a model: 32 hex digits."""
    digest = xxhash.xxh3_128()
    for path in sorted(p for part in parts for p in (folder / part).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(b"".join(_samples(path)))
    return digest.hexdigest()


_POINTED_AT = "a pointer of Git LFS; `git lfs pull` fetches the file itself"


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for n in range(_SAMPLES):
            file.seek(n * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _listed(index: Path) -> set[str]:
    """Names of the files that an index says the tensors are in, all beside it."""
    found = read_json(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise SchemaMismatchError(
            f"model: expected a weight_map of files beside it in {index}, got {_short(found)}"
        )
    return set(names)


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Give dtype and bytes of each tensor; loading would find out as well, but not which file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise _no_weights(path, _POINTED_AT)
        length = struct.unpack_from("<Q", start)[0] if len(start) >= 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise _no_weights(path, f"{size:,} bytes without a whole header")
        file.seek(8)
        header = file.read(length)
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _no_weights(path, f"a header that is no JSON: {error}") from None
    if not isinstance(tensors, dict):
        raise _no_weights(path, f"a header that is no JSON object: {_short(tensors)}")
    end = 0
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        place = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not _is_place(place) or not isinstance(tensor.get("dtype"), str):
            raise _no_weights(path, f"a header with {_short({name: tensor})}")
        end = max(end, place[1])
        yield tensor["dtype"], place[1] - place[0]
    if 8 + length + end != size:
        raise _no_weights(path, f"{size:,} bytes where its header says {8 + length + end:,}")


def _no_weights(path: Path, got: str) -> SchemaMismatchError:
    return SchemaMismatchError(f"model: expected safetensors weights in {path}, got {got}")


def _is_place(found: object) -> TypeGuard[list[int]]:
    if not isinstance(found, list) or len(found) != 2:
        return False
    return all(type(n) is int for n in found) and 0 <= found[0] <= found[1]


def _is_whole(found: object, least: int) -> bool:
    return type(found) is int and least <= found < _LARGEST_NUMBER


def _check(fits: bool, what: str, config: Mapping[str, Any], key: str, where: str) -> None:
    if not fits:
        got = _short(config[key]) if key in config else "none"
        raise SchemaMismatchError(f"model: expected {what} as {key} in {where}, got {got}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
