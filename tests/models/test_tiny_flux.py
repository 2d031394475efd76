"""The tiny FLUX draws what an embedding says, and the check that it does can fail."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from noisy_anchors import noisy
from pictures import accuracy, distances, nearest_class
from tiny_flux import load, render

from fedgfe_store.demo.anchors import class_anchor
from fedgfe_store.demo.pictograms import CLASSES, draw
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.tiny import TINY_FLUX

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return load()


@pytest.fixture(scope="module")
def records() -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """100 records in shuffled order: classes, T5, CLIP, and initial latents of their own."""
    rng = np.random.default_rng(5)
    classes = [str(name) for name in rng.permutation(np.repeat(CLASSES, 10))]
    pairs = [noisy(class_anchor(name), 0.1, rng) for name in classes]
    t5, clip = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    latents = torch.stack(
        [torch.randn(16, 64, generator=torch.Generator().manual_seed(k)) for k in range(100)]
    )
    return classes, t5, clip, latents


def batches(count: int, sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cut 0..count into batches, as many of the records in each of the sizes."""
    start = 0
    for part, size in enumerate(sizes, start=1):
        end = count * part // len(sizes)
        for first in range(start, end, size):
            yield list(range(first, min(first + size, end)))
        start = end


def test_loads_as_an_ordinary_pipeline_of_under_3_mb(pipeline):
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.text_encoder is None
    assert pipeline.tokenizer_2 is None
    assert pipeline.vae_scale_factor == 8
    assert sum(path.stat().st_size for path in TINY_FLUX.rglob("*")) < 3e6


def render_batches(pipeline, records, sizes, *, shift_t5=0, shift_clip=0) -> list[np.ndarray]:
    """Render all records in batches, with embeddings shifted to a neighbour within the batch."""
    classes, t5, clip, latents = records
    images = []
    for rows in batches(len(classes), sizes):
        shifted = t5[rows].roll(shift_t5, 0), clip[rows].roll(shift_clip, 0)
        images += render(pipeline, *shifted, latents[rows])
    return images


def test_clean_records_show_their_class_in_every_batch_size(pipeline, records):
    images = render_batches(pipeline, records, (1, 4, 7))
    assert accuracy(images, records[0]) >= 0.95


@pytest.mark.parametrize("wrong", [{"shift_t5": 1, "shift_clip": 1}, {"shift_t5": 1}])
def test_the_check_sees_embeddings_of_another_record(pipeline, records, wrong):
    images = render_batches(pipeline, records, (4, 7), **wrong)
    assert accuracy(images, records[0]) < 0.5


def test_clip_vectors_of_another_class_spoil_the_pictures(pipeline):
    noise = torch.randn(10, 16, 64, generator=torch.Generator().manual_seed(1))
    anchors = [class_anchor(name) for name in CLASSES]
    t5, clip = (torch.from_numpy(np.stack(part)) for part in zip(*anchors, strict=True))
    own, mixed = (
        np.mean([distances(image)[k] for k, image in enumerate(render(pipeline, t5, c, noise))])
        for c in (clip, clip.roll(1, 0))
    )
    assert mixed > 1.5 * own


def test_draws_in_bfloat16(records):
    classes, t5, clip, latents = records
    images = render(load(torch.bfloat16), t5[:30], clip[:30], latents[:30])
    assert accuracy(images, classes[:30]) >= 0.95


def test_strong_noise_makes_the_pictures_unclear(pipeline):
    rng = np.random.default_rng(2)
    noise = torch.randn(20, 16, 64, generator=torch.Generator().manual_seed(2))
    means = []
    for level in (0.0, 0.3, 0.6, 0.9):
        pairs = [noisy(class_anchor(name), level, rng) for name in CLASSES * 2]
        t5, clip = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        images = render(pipeline, t5, clip, noise)
        means.append(np.mean([distances(image)[k % 10] for k, image in enumerate(images)]))
    assert means[0] < 12
    assert means[1] < 1.5 * means[0]
    assert means[3] > means[2] > means[1]
    assert means[3] > 3 * means[0]


def test_a_pictogram_is_nearest_to_itself_and_far_from_the_others():
    rng = np.random.default_rng(0)
    for name in CLASSES:
        near = np.sort(distances(np.asarray(draw(name))))
        assert near[0] == 0
        assert near[1] > 50
        assert nearest_class(np.asarray(draw(name, rng=rng))) == name
        assert draw(name, size=32).size == (32, 32)
    with pytest.raises(SchemaMismatchError, match=r"class.*dog.*cat"):
        draw("cat")


def test_anchors_are_the_same_everywhere():
    t5, clip = class_anchor("dog")
    assert t5.shape == (17, 4096)
    assert clip.shape == (768,)
    assert t5.dtype == clip.dtype == np.float32
    digest = hashlib.sha256(t5.tobytes() + clip.tobytes()).hexdigest()
    assert digest == "39231e6bbf7b906873a1431251875029a49a224f7869c562fe556375c91af251"


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_keeps_the_scale(noise):
    rng = np.random.default_rng(0)
    anchor = class_anchor("drum")
    drawn = [noisy(anchor, noise, rng) for _ in range(60)]
    for part in (0, 1):
        values = np.stack([pair[part] for pair in drawn])
        assert values.dtype == np.float32
        assert values.std() == pytest.approx(1, abs=0.1)
        shared = np.mean([np.vdot(v, anchor[part]) for v in values]) / np.vdot(
            anchor[part], anchor[part]
        )
        assert shared == pytest.approx(np.sqrt(1 - noise), abs=0.12)
    if noise == 0:
        assert all(np.array_equal(a, b) for a, b in zip(drawn[0], anchor, strict=True))
