"""Each command that computes, as it is run on a machine with a GPU; the GPU is simulated."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from generation_fakes import SIZE, save_random_clip, save_random_flux
from PIL import Image
from virtual_gpu.device import Cards

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images import clip, features
from fedgfe_store.models import diffusers
from fedgfe_store.text import encoders

N = 4


@dataclass(frozen=True)
class Made:
    store: Path
    flux: Path
    clip: Path
    pictures: Path
    texts: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store, models of random weights, and what the CPU makes of them."""
    root = tmp_path_factory.mktemp("made")
    store = EmbeddingStore.create(root / "store.zarr", Schema.flux(5, width=8, clip=(4,)))
    rng = np.random.default_rng(0)
    with store.append(node=0, round=5) as batch:
        batch.add(
            split="train",
            class_name=["dog", "cat"] * (N // 2),
            index=range(N),
            t5=rng.standard_normal((N, 5, 8), np.float32),
            clip=rng.standard_normal((N, 4), np.float32),
        )
    flux = save_random_flux(root / "flux", encoders=True)
    vision = save_random_clip(root / "clip")
    texts = {dtype: root / f"{dtype}.zarr" for dtype in ("bfloat16", "float32")}
    made = Made(store.path, flux, vision, root / "pictures", texts)
    generate(made, made.pictures, "--device", "cpu")
    for dtype, path in texts.items():
        encode(made, path, "--device", "cpu", "--dtype", dtype)
    return made


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "FEDGFE_MODEL"):
        monkeypatch.delenv(name, raising=False)


def run(store: Path, *words: object) -> str:
    result = CliRunner().invoke(group, ["--store", str(store), *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def generate(made: Made, folder: Path, *words: str) -> str:
    size = ("--steps", 2, "--height", SIZE, "--width", SIZE)
    place = ("--model", made.flux, "--output-dir", folder)
    return run(made.store, "generate", *place, *size, *words)


def encode(made: Made, store: Path, *words: str) -> str:
    return run(store, "encode", "--model", made.flux, "--class", "dog,cat", *words)


def assert_same_pictures(expected: Path, got: Path) -> None:
    names = sorted(path.name for path in expected.glob("*.png"))
    assert len(names) == N
    assert sorted(path.name for path in got.glob("*.png")) == names
    for name in names:
        with Image.open(expected / name) as one, Image.open(got / name) as other:
            apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
        assert apart.max() <= 1, name


def test_generate(made: Made, cards: Cards, tmp_path: Path) -> None:
    before = cards.taken(0)
    said = generate(made, tmp_path / "default")
    assert "bfloat16 on cuda:0" in said
    assert f"{N} images rendered" in said
    assert "float32 on cuda:0" in generate(made, tmp_path / "exact", "--dtype", "float32")
    assert_same_pictures(made.pictures, tmp_path / "exact")
    assert cards.taken(0) > before


def test_each_process_of_a_machine_takes_its_own_card(
    made: Made, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cards.taken(0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "float32 on cuda:1" in generate(made, tmp_path, "--dtype", "float32")
    assert_same_pictures(made.pictures, tmp_path)
    assert cards.taken(0) == before
    assert cards.taken(1) > 0


PLACES: list[tuple[list[str], dict[str, str], int, str]] = [
    ([], {}, 2, "cuda:0"),
    (["--device", "cuda"], {}, 2, "cuda:0"),
    (["--device", "cuda:1"], {}, 2, "cuda:1"),
    ([], {"LOCAL_RANK": "1"}, 2, "cuda:1"),
    (["--device", "cuda"], {"LOCAL_RANK": "1"}, 2, "cuda:1"),
    (["--device", "cuda:0"], {"LOCAL_RANK": "1"}, 2, "cuda:0"),
    ([], {"SLURM_LOCALID": "1"}, 2, "cuda:1"),
    ([], {"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 2, "cuda:1"),
    # A scheduler may show each process its own card alone, as the first.
    ([], {"SLURM_LOCALID": "1"}, 1, "cuda:0"),
    (["--device", "cuda"], {"LOCAL_RANK": "1"}, 1, "cuda:0"),
]
"""What is asked for, what a launcher says, how many cards are visible; and the card to be taken."""
COMMANDS = {
    "generate": ["--model", "{flux}", "--output-dir", "{out}"],
    "sweep": ["--model", "{flux}", "--output-dir", "{out}", "--seed", "0,1"],
    "encode": ["--model", "{flux}", "--class", "bird"],
    "score": ["--clip-model", "{clip}", "--input-dir", "{pictures}"],
    "fidelity": ["--features", "{clip}", "--input-dir", "{pictures}", "--to", "round=5"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_finds_its_card(
    made: Made, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def nothing_more(doing: str, *remedies: str) -> None:
        raise SchemaMismatchError(doing)

    # It is where weights are loaded, and says onto what.
    for module in (diffusers, encoders, clip, features):
        monkeypatch.setattr(module, "enough_memory", nothing_more)
    where = {"flux": made.flux, "clip": made.clip, "pictures": made.pictures, "out": tmp_path}
    given = [word.format_map(where) for word in COMMANDS[command]]
    for words, environ, visible, expected in PLACES:
        cards.show(visible)
        with monkeypatch.context() as launched:
            for name, value in environ.items():
                launched.setenv(name, value)
            said = refused(made.store, command, *given, *words)
        found = re.search(r"error: .*loading the .* (?:on|onto) (cuda:\d)", said)
        assert found, said
        assert found[1] == expected, (words, environ, visible)
    cards.show(1)
    said = refused(made.store, command, *given, "--device", "cuda:1")
    assert said.startswith("error: device: expected one of this machine, got 'cuda:1'")


@pytest.mark.parametrize(
    ("offload", "dtype"),
    [("auto", "bfloat16"), ("none", "float32"), ("model", "float32"), ("sequential", "float32")],
)
def test_encode(made: Made, cards: Cards, tmp_path: Path, offload: str, dtype: str) -> None:
    before = cards.taken(0)
    words = () if offload == "auto" else ("--offload", offload, "--dtype", dtype)
    assert f"{dtype} on cuda:0" in encode(made, tmp_path / "texts.zarr", *words)
    expected, got = (
        EmbeddingStore.open(path).select() for path in (made.texts[dtype], tmp_path / "texts.zarr")
    )
    assert got.keys() == expected.keys()
    # bfloat16 has three digits, and a GPU's operations are other ones.
    apart = 0.05 if dtype == "bfloat16" else 1e-5
    for column in ("t5", "clip"):
        np.testing.assert_allclose(got.read(column), expected.read(column), rtol=apart, atol=apart)
    assert cards.taken(0) > before
    gc.collect()
    assert cards.held(0) == 0


def test_score(made: Made, cards: Cards) -> None:
    before = cards.taken(0)
    common = ("score", "--clip-model", made.clip, "--input-dir", made.pictures, "--format", "json")
    both = []
    for options in (["--device", "cpu"], []):
        lines = run(made.store, *common, "--by", "class,index", "--quiet", *options).splitlines()
        both.append([json.loads(line) for line in lines])
    expected, got = both
    assert len(got) == N
    for one, other in zip(expected, got, strict=True):
        assert other == {**one, "similarity": pytest.approx(one["similarity"], abs=1e-5)}
    assert cards.taken(0) > before


def refused(store: Path, *words: object) -> str:
    result = CliRunner().invoke(group, ["--store", str(store), *map(str, words)])
    assert result.exit_code == 1, result.output
    return result.stderr.splitlines()[-1]


def test_weights_that_do_not_fit_are_told_in_a_line(
    made: Made, cards: Cards, tmp_path: Path
) -> None:
    cards.limit(0, 1)
    place = ("--offload", "none", "--output-dir", tmp_path)
    said = refused(made.store, "generate", "--model", made.flux, *place)
    assert said.startswith(
        "error: out of memory loading the model flux in bfloat16 on cuda:0, offload none (CUDA"
    )
    assert said.endswith("--offload model or group or sequential may help")


def test_encoders_and_clip_that_do_not_fit_are_told_in_a_line(
    made: Made, cards: Cards, tmp_path: Path
) -> None:
    cards.limit(0, 1)
    words = ("encode", "--model", made.flux, "--class", "dog", "--offload", "none")
    said = refused(tmp_path / "texts.zarr", *words)
    assert said.startswith("error: out of memory loading the text encoders of flux in bfloat16 on")
    assert said.endswith("--offload model or sequential may help")
    scoring = ("score", "--clip-model", made.clip, "--input-dir", made.pictures, "--quiet")
    said = refused(made.store, *scoring)
    assert said.startswith(f"error: out of memory loading the model {made.clip} onto cuda:0 (CUDA")
    assert said.endswith("--device cpu may help")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: error code 12")],
)
def test_a_host_without_room_for_weights_is_told_in_a_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_room(*given: object, **options: object) -> None:
        raise error

    for module in (diffusers, encoders):
        monkeypatch.setattr(module, "load_part", no_room)
    for words in (
        ("generate", "--model", made.flux, "--output-dir", tmp_path),
        ("encode", "--model", made.flux, "--class", "bird"),
    ):
        said = refused(made.store, *words)
        assert said.startswith("error: out of memory loading the ")
        assert said.endswith(
            "; more memory of the host (--mem under SLURM) or fewer processes on it may help"
        )


def test_a_host_that_pins_nothing_is_told_in_a_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(tensor: torch.Tensor, *given: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", no_room)
    place = ("--offload", "group", "--output-dir", tmp_path)
    said = refused(made.store, "generate", "--model", made.flux, *place)
    assert said.startswith("error: out of memory loading the model flux in bfloat16 on cuda:0")
    assert said.endswith("(--mem under SLURM) or fewer processes on it may help")


def taken(index: int) -> Iterator[torch.Tensor]:
    """Take all that a card has left."""
    for size in (2**20, 2**15, 2**9):
        with suppress(torch.OutOfMemoryError):
            while True:
                yield torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")


def test_a_card_too_small_to_encode_is_told_with_what_helps(
    made: Made, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(model: encoders.TextEncoders, prompts: object, *given: object) -> object:
        cards.empty()
        cards.limit(0, 0)
        kept = list(taken(0))  # what is free in torch's own segments
        try:
            return real(model, prompts, *given)  # type: ignore[arg-type]
        finally:
            kept.clear()

    real = encoders.TextEncoders._encode
    monkeypatch.setattr(encoders.TextEncoders, "_encode", encode)
    words = ("encode", "--model", made.flux, "--class", "dog", "--offload", "sequential")
    said = refused(tmp_path / "texts.zarr", *words)
    assert said.startswith("error: out of memory encoding 1 prompts in bfloat16 on cuda:0, offload")
    assert said.endswith("; --device cpu or a GPU with more free memory may help")
    run(tmp_path / "texts.zarr", *words, "--device", "cpu")
    assert len(EmbeddingStore.open(tmp_path / "texts.zarr").select(class_name="dog")) == 1
