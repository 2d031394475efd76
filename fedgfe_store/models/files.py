"""The files of a model's folder, which anybody may have written: configurations and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from fedgfe_store.errors import NotFoundError, SchemaMismatchError

FP16 = "fp16"
"""The variant of weight files that is taken where there are no others."""

# Far above any tokenizer's, the largest; a file that anybody may have written has a bound.
_LARGEST_JSON = 64 * 2**20
_LARGEST_NUMBER = 2**31
_POINTER = b"version https://git-lfs.github.com/"
# A few milliseconds for files of any size; training changes weights everywhere.
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
        return sum(numbers for numbers, _ in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, str]]:
        """Give of each tensor how many numbers it has, and their dtype as the files name it.

        Raises
        ------
        SchemaMismatchError
            If a file is not whole.
        """
        return {name: found for file in self.files for name, found in _tensors(file).items()}


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


def check_reals(config: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a configuration in which a key is no list of numbers."""
    found = config.get(key)
    fits = isinstance(found, list) and bool(found) and all(type(n) in (int, float) for n in found)
    _check(fits, "a list of numbers", config, key, where)


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


def _tensors(path: Path) -> dict[str, tuple[int, str]]:
    """Look at a file's tensors; loading would refuse a spoilt one as well, but not say which."""
    with path.open("rb") as file:
        pointer = file.read(len(_POINTER)) == _POINTER
    try:
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {n: (prod(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        got = _POINTED_AT if pointer else f"a spoilt file ({error})"
        raise SchemaMismatchError(
            f"model: expected safetensors weights in {path}, got {got}"
        ) from None


def _is_whole(found: object, least: int) -> bool:
    return type(found) is int and least <= found < _LARGEST_NUMBER


def _check(fits: bool, what: str, config: Mapping[str, Any], key: str, where: str) -> None:
    if not fits:
        got = _short(config[key]) if key in config else "none"
        raise SchemaMismatchError(f"model: expected {what} as {key} in {where}, got {got}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
