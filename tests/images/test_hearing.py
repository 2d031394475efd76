"""Images and the sounds of their records: transformers' own numbers, ranks counted by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL
from gallery_pages import SETTINGS, add
from generation_fakes import letters, save_random_clip
from PIL import Image
from scipy.io import wavfile
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPModel,
    CLIPProcessor,
)

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.clap import Clap
from fedgfe_store.images.clip import Clip
from fedgfe_store.images.hearing import Space, class_space, compare_with_sounds
from fedgfe_store.images.scoring import PROMPT, selected_images
from fedgfe_store.images.sound import read_sound, sound_files

CLASSES = ["cat", "dog", "drum"]
RATE = 8_000


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A CLAP and a CLIP of random weights."""
    root = tmp_path_factory.mktemp("models")
    folder = root / "clap"
    folder.mkdir()
    text = {"vocab_size": 54, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": 120, "pad_token_id": 53,
            "eos_token_id": 53, "bos_token_id": 52}  # fmt: skip
    audio = {"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4],
             "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "window_size": 4,
             "num_attention_heads": [2, 2], "num_hidden_layers": 2}  # fmt: skip
    torch.manual_seed(3)
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    extractor = ClapFeatureExtractor(
        feature_size=8, sampling_rate=16_000, hop_length=160, max_length_s=1, fft_window_size=256,
        frequency_max=8_000, truncation="rand_trunc",
    )  # fmt: skip
    extractor.save_pretrained(folder)
    letters(folder, 40).save_pretrained(folder)
    return folder, save_random_clip(root / "clip")


@pytest.fixture
def experiment(tmp_path) -> tuple[Path, Path]:
    """Two rounds of three classes, two samples each, with a sound and an image for each."""
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    rng = np.random.default_rng(0)
    for round in (1, 2):
        with store.append(node="0", round=round) as batch:
            for name in CLASSES:
                batch.add(
                    split="test", class_name=name, index=range(2),
                    t5=rng.standard_normal((2, *SMALL.columns["t5"]), np.float32),
                    clip=rng.standard_normal((2, *SMALL.columns["clip"]), np.float32),
                    audio_path=[f"sounds/{name}_{index}.wav" for index in range(2)],
                )  # fmt: skip
    (tmp_path / "sounds").mkdir()
    for place, name in enumerate(CLASSES):
        for index in range(2):
            time = np.arange(RATE) / RATE
            tone = np.sin(2 * np.pi * (200 + 700 * place + 90 * index) * time)
            both = np.stack([tone, tone + rng.normal(0, 0.3, RATE)], axis=1)
            path = tmp_path / "sounds" / f"{name}_{index}.wav"
            wavfile.write(path, RATE, (8_000 * both).astype(np.int16))
    for key in EmbeddingStore.open(store.path).select().keys():
        add(tmp_path / "images", key, colour=rng.integers(0, 256, (8, 8, 3)), settings=SETTINGS)
    return store.path, tmp_path


def shares(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    found /= found.sum(axis=1, keepdims=True)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def seen(clip: Path, files: Sequence[Path]) -> np.ndarray:
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    images = [Image.open(file).convert("RGB") for file in files]
    texts = [f"a photo of a {name}" for name in CLASSES]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        return shares(model(**inputs).logits_per_image.numpy())


def heard(clap: Path, files: Sequence[Path]) -> np.ndarray:
    model, extractor = ClapModel.from_pretrained(clap), ClapFeatureExtractor.from_pretrained(clap)
    tokens = letters(clap, 40)([f"the sound of a {name}" for name in CLASSES],
                               return_tensors="pt", padding=True)  # fmt: skip
    rows = []
    for file in files:
        sound = read_sound(file, 16_000)
        inputs = extractor(sound, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**tokens, **inputs).logits_per_audio.numpy()[0])
    return shares(np.stack(rows))


@pytest.mark.model
def test_similarities_are_those_of_transformers_and_ranks_are_counted(models, experiment):
    clap, clip = models
    path, root = experiment
    selection = EmbeddingStore.open(path).select()
    found = selected_images(selection, root / "images")
    files = sound_files(selection, root)
    space = class_space(Clap.load(clap, "cpu"), Clip.load(str(clip), "cpu"), CLASSES, PROMPT)
    done: list[int] = []
    result = compare_with_sounds(found, files, space, batch_size=5, progress=done.append)
    assert (sum(done), result.sounds, result.left_out) == (6 + 12, 6, {})
    sounds = sorted(set(files.values()))
    cosines = seen(clip, [image.file for image in found.images]) @ heard(clap, sounds).T
    for image, cosine, row in zip(found.images, cosines, result.frame.to_dict("records"),
                                  strict=True):  # fmt: skip
        own = sounds.index(files[image.key])
        assert (row["file"], row["sound"]) == (image.name, str(sounds[own]))
        assert row["similarity"] == pytest.approx(cosine[own], abs=1e-5)
        others = np.delete(cosine, own)
        assert np.abs(others - cosine[own]).min() > 1e-5
        assert (row["rank"], row["ties"]) == (1 + (others > cosine[own]).sum(), 0)
    table = result.table(["round"])
    ranks = result.frame.groupby("round")["rank"]
    assert table["R@1"].tolist() == ranks.apply(lambda r: (r == 1).mean()).tolist()
    assert table["R@5"].tolist() == ranks.apply(lambda r: (r <= 5).mean()).tolist()
    assert table["R@10"].tolist() == [1, 1]


def constant(things: Sequence[object]) -> np.ndarray:
    return np.tile(np.array([0.6, 0.8], np.float32), (len(things), 1))


def test_who_hears_no_difference_retrieves_by_chance(experiment):
    path, root = experiment
    selection = EmbeddingStore.open(path).select()
    found = selected_images(selection, root / "images")
    space = Space(RATE, constant, constant)
    table = compare_with_sounds(found, sound_files(selection, root), space).table(["node"])
    assert table[["R@1", "R@5", "R@10"]].to_numpy() == pytest.approx(np.array([[1 / 6, 5 / 6, 1]]))


def test_sounds_are_read_at_the_rate_that_is_asked_for(tmp_path):
    time = np.arange(12 * RATE) / RATE
    tone = np.sin(2 * np.pi * 500 * time)
    wavfile.write(tmp_path / "tone.wav", RATE, (16_000 * tone).astype(np.int16))
    sound = read_sound(tmp_path / "tone.wav", 16_000)
    assert sound is not None
    # Ten seconds of twelve.
    assert (sound.shape, str(sound.dtype)) == ((160_000,), "float32")
    expected = 16_000 / 32_768 * np.sin(2 * np.pi * 500 * np.arange(160_000) / 16_000)
    assert np.abs(sound - expected)[200:-200].max() < 2e-3
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    wavfile.write(tmp_path / "empty.wav", RATE, np.zeros(0, np.int16))
    assert read_sound(tmp_path / "torn.wav", RATE) is None
    assert read_sound(tmp_path / "empty.wav", RATE) is None


def test_sounds_that_are_missing_or_damaged_are_named(experiment):
    path, root = experiment
    selection = EmbeddingStore.open(path).select()
    found = selected_images(selection, root / "images")
    space = Space(RATE, constant, constant)
    (root / "sounds/cat_0.wav").unlink()
    (root / "sounds/dog_1.wav").write_bytes(b"RIFF")
    result = compare_with_sounds(found, sound_files(selection, root), space)
    assert result.left_out == {
        str(root / "sounds/cat_0.wav"): "there is no such sound",
        "dog_1.wav": "damaged",
    }
    assert (len(result.frame), result.sounds) == (8, 4)
    with pytest.raises(NotFoundError, match="none of 6 sounds is there, such as .*cat_0.wav"):
        compare_with_sounds(found, sound_files(selection, root / "images"), space)
    with pytest.raises(NotFoundError, match="none of the 12 images' records has an audio_path"):
        compare_with_sounds(found, {}, space)
    # An absolute path of another machine: its name is looked for.
    moved = root / "moved"
    shutil.move(root / "sounds", moved)
    assert sound_files(selection, moved)[found.images[0].key].parent == moved / "sounds"


@pytest.mark.model
def test_the_command_and_what_it_refuses(models, experiment, tmp_path):
    clap, clip = models
    path, root = experiment
    words = ["--store", str(path), "audio", "--audio-model", str(clap), "--clip-model", str(clip)]
    words += ["--input-dir", str(root / "images"), "--device", "cpu"]
    done = CliRunner().invoke(
        group, [*words, "--audio-dir", str(root), "--plot", str(root / "plot.png")]
    )
    assert done.exit_code == 0, done.output
    assert "12 pictures among 6 sounds; R@1, R@5 and R@10 by chance: 16.7%" in done.stdout
    assert (root / "plot.png").is_file()
    (root / "sounds/cat_0.wav").unlink()
    done = CliRunner().invoke(group, [*words, "--audio-dir", str(root), "--format", "json"])
    assert done.exit_code == 3
    assert [json.loads(line)["pictures"] for line in done.stdout.splitlines()] == [5, 5]
    with pytest.raises(SchemaMismatchError, match="expected a CLAP of transformers, got clip"):
        Clap.load(clip)
    with pytest.raises(NotFoundError, match="expected the folder of a CLAP"):
        Clap.load(tmp_path / "none")
