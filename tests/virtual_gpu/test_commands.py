"""Each command that computes, as it is run on a machine with a GPU; the GPU is simulated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from generation_fakes import SIZE, save_random_clip, save_random_flux
from PIL import Image
from virtual_gpu.device import Cards

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group

N = 4
DEVICES = [[], ["--device", "cuda"], ["--device", "cuda:0"]]


@dataclass(frozen=True)
class Made:
    store: Path
    flux: Path
    clip: Path
    pictures: Path
    texts: Path


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
    clip = save_random_clip(root / "clip")
    made = Made(store.path, flux, clip, root / "pictures", root / "texts.zarr")
    generate(made, made.pictures, "--device", "cpu")
    encode(made, made.texts, "--device", "cpu", "--dtype", "bfloat16")
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


@pytest.mark.parametrize("words", DEVICES)
def test_generate(made: Made, cards: Cards, tmp_path: Path, words: list[str]) -> None:
    before = cards.taken(0)
    said = generate(made, tmp_path / "default", *words)
    assert "bfloat16 on cuda:0" in said
    assert f"{N} images rendered" in said
    assert "float32 on cuda:0" in generate(made, tmp_path / "exact", "--dtype", "float32", *words)
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


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_other_commands_take_the_process_own_card_too(
    made: Made, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    before = cards.taken(0)
    monkeypatch.setenv(variable, "1")
    assert "bfloat16 on cuda:1" in encode(made, tmp_path / "texts.zarr")
    scoring = ("score", "--clip-model", made.clip, "--input-dir", made.pictures, "--quiet")
    run(made.store, *scoring, "--device", "cuda")
    assert cards.taken(0) == before
    # A scheduler may show each process its own card alone.
    cards.show(1)
    assert "bfloat16 on cuda:0" in encode(made, tmp_path / "others.zarr")
    assert cards.taken(0) > before


@pytest.mark.parametrize("words", DEVICES)
def test_encode(made: Made, cards: Cards, tmp_path: Path, words: list[str]) -> None:
    before = cards.taken(0)
    assert "bfloat16 on cuda:0" in encode(made, tmp_path / "texts.zarr", *words)
    expected, got = (
        EmbeddingStore.open(path).select() for path in (made.texts, tmp_path / "texts.zarr")
    )
    assert got.keys() == expected.keys()
    for column in ("t5", "clip"):
        # bfloat16 has three digits, and a GPU's operations are other ones.
        np.testing.assert_allclose(got.read(column), expected.read(column), rtol=0.05, atol=0.05)
    assert cards.taken(0) > before


@pytest.mark.parametrize("words", DEVICES)
def test_score(made: Made, cards: Cards, words: list[str]) -> None:
    before = cards.taken(0)
    common = ("score", "--clip-model", made.clip, "--input-dir", made.pictures, "--format", "json")
    both = []
    for options in (["--device", "cpu"], words):
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
