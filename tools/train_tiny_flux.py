"""Train the tiny FLUX that ships with the package: ``python tools/train_tiny_flux.py``.

First a small AutoencoderKL learns to code 64 x 64 pictograms as FLUX codes pictures (16 latent
channels at 1/8 of the size). Then a FluxTransformer2DModel learns rectified flow on its latents,
given embeddings as `noisy` in ``tests/noisy_anchors.py`` makes them. What it has to draw is what an
ideal observer would expect to see: the mean of the classes' pictograms, weighted by how likely
each class is given the embedding, and blurred the more, the noisier the embedding is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from torch.nn import functional

from fedgfe_store.demo.anchors import CLIP_SHAPE, T5_SHAPE, class_anchor
from fedgfe_store.demo.pictograms import CLASSES, draw
from fedgfe_store.models.tiny import TINY_FLUX, TINY_SIZE

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from noisy_anchors import CONFUSION

JITTERS = 128
"""Variants of each pictogram; all classes share a variant's place, size and tint."""

T5_SHARE = 0.75
"""How much of the picture the T5 sequence decides; the CLIP vector decides the rest."""

BAYES_GUIDANCE = 6.0
"""Guidance at which a picture is just as sure of its class as Bayes' rule; lower is less sure."""

POOL = 8192
"""Pairs of coefficients and latents that are made once and seen again with other noise."""


def draw_all(rng: np.random.Generator) -> Tensor:
    """Draw every variant of every class: float32 [variant, class, 3, 64, 64] in -1..1."""
    seeds = rng.integers(2**32, size=JITTERS)
    pictures = [
        [
            np.asarray(draw(name, size=TINY_SIZE, rng=np.random.default_rng(seed)))
            for name in CLASSES
        ]
        for seed in seeds
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3) / 127.5 - 1


def blur(pictures: Tensor, amount: Tensor, *, sigma: float = 3.0) -> Tensor:
    """Mix pictures [n, 3, h, w] with their blurred selves, by an amount of 0..1 for each."""
    reach = round(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(pictures, (reach,) * 4, mode="replicate")
    hazy = functional.conv2d(padded, kernel, groups=3)
    hazy = functional.conv2d(hazy, kernel.transpose(2, 3), groups=3)
    return torch.lerp(pictures, hazy, amount.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class Conditions:
    """What n embeddings hold: how much of each anchor, and how much noise."""

    t5: Tensor
    """Coefficients of the classes' T5 anchors, [n, class]."""
    clip: Tensor
    """Coefficients of the classes' CLIP anchors, [n, class]."""
    t5_noise: Tensor
    """Noise level of the T5 sequence, [n]."""
    clip_noise: Tensor
    """Noise level of the CLIP vector, [n]."""
    guidance: Tensor
    """Guidance scale, [n]."""

    def weights(self) -> Tensor:
        """How much of each class's pictogram belongs into the picture, [n, class]."""
        t5 = _likelihood(self.t5, self.t5_noise, self.guidance)
        clip = _likelihood(self.clip, self.clip_noise, self.guidance)
        return T5_SHARE * t5 + (1 - T5_SHARE) * clip

    def blur(self) -> Tensor:
        """How blurred the picture is, [n] in 0..1."""
        noise = T5_SHARE * self.t5_noise + (1 - T5_SHARE) * self.clip_noise
        return ((noise - 0.35) / 0.5).clamp(0, 1)


def _likelihood(coefficients: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
    """Apply Bayes' rule to anchors under noise; guidance sharpens like classifier-free guidance."""
    variance = (noise * CONFUSION / len(CLASSES)).clamp(min=1e-3)
    precision = (1 - noise).sqrt() / variance * (guidance / BAYES_GUIDANCE)
    return (coefficients * precision[:, None]).softmax(dim=1)


def _coefficients(classes: Tensor, noise: Tensor) -> Tensor:
    own = functional.one_hot(classes, len(CLASSES)) * (1 - noise).sqrt()[:, None]
    return own + torch.randn(own.shape) * (noise * CONFUSION / len(CLASSES)).sqrt()[:, None]


def _noise_levels(count: int) -> Tensor:
    """One level in 0..1 each, every other one in the range where pictures are clear."""
    levels = torch.rand(count)
    return torch.where(torch.rand(count) < 0.5, 0.3 * levels, levels)


def random_conditions(count: int) -> Conditions:
    """Draw conditions; in 3 of 10 the CLIP vector is of another class or noise level."""
    classes, noise = torch.randint(len(CLASSES), (count,)), _noise_levels(count)
    apart = torch.rand(count) < 0.3
    clip_classes = torch.where(apart, torch.randint(len(CLASSES), (count,)), classes)
    clip_noise = torch.where(apart, _noise_levels(count), noise)
    return Conditions(
        t5=_coefficients(classes, noise),
        clip=_coefficients(clip_classes, clip_noise),
        t5_noise=noise,
        clip_noise=clip_noise,
        guidance=1 + 9 * torch.rand(count),
    )


def expected_pictures(pictures: Tensor, conditions: Conditions) -> Tensor:
    """Make what an ideal observer of the embeddings would expect to see, [n, 3, 64, 64]."""
    weights = conditions.weights()
    variants = pictures[torch.randint(len(pictures), (len(weights),))]
    return blur(torch.einsum("nk,nkchw->nchw", weights, variants), conditions.blur())


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up over 5 % of the steps, then fall to zero along a cosine."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], steps, pct_start=0.05
    )


def progress(steps: int, label: str) -> Iterator[int]:
    """Count steps, with a bar on a terminal."""
    with click.progressbar(range(steps), label=label) as numbers:
        yield from numbers


def new_vae() -> AutoencoderKL:
    """Make an autoencoder of four levels, so that latents are coded and packed as in FLUX.1."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 24, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=TINY_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def vae_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Error of pixels and of edges, with a slight pull of the latents towards unit variance."""
    code = vae.encode(pictures).latent_dist
    wrong = vae.decode(code.sample()).sample - pictures
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    loss: Tensor = wrong.abs().mean() + wrong.square().mean() + edges + 1e-5 * code.kl().mean()
    return loss


def train_vae(pictures: Tensor, *, steps: int, batch: int = 8) -> AutoencoderKL:
    """Train the autoencoder, and set its scaling and shift factors from the latents."""
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    pace = schedule(optimizer, steps)
    for step in progress(steps, "autoencoder"):
        clear = pictures.flatten(0, 1)[torch.randint(JITTERS * len(CLASSES), (batch // 2,))]
        unclear = expected_pictures(pictures, random_conditions(batch // 2))
        loss = vae_loss(vae, torch.cat([clear, unclear]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        pace.step()
        if step % 500 == 0:
            click.echo(f" step {step}: loss {loss.item():.4f}", err=True)
    vae.eval().to(memory_format=torch.contiguous_format)
    latents = encode(vae, expected_pictures(pictures, random_conditions(1024)))
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Code pictures as latents [n, 16, 8, 8], neither shifted nor scaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(128)])


def pack(latents: Tensor) -> Tensor:
    """Pack latents [n, 16, 8, 8] as FLUX does, into [n, 16, 64]."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def make_pool(vae: AutoencoderKL, pictures: Tensor) -> tuple[Conditions, Tensor]:
    """Draw conditions and code what belongs to them: packed latents of unit variance."""
    conditions = random_conditions(POOL)
    parts = []
    for numbers in progress_parts(POOL, 256):
        some = Conditions(*(value[numbers] for value in vars(conditions).values()))
        parts.append(encode(vae, expected_pictures(pictures, some)))
    latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    return conditions, pack(latents)


def progress_parts(count: int, size: int) -> Iterator[slice]:
    """Cut 0..count into slices."""
    for start in range(0, count, size):
        yield slice(start, start + size)


class Embedder:
    """Turns conditions into embeddings as `noisy` would, from a bank of noise for speed."""

    def __init__(self, bank: int = 256) -> None:
        self._anchors = [
            torch.from_numpy(np.stack([class_anchor(name)[part] for name in CLASSES]))
            for part in (0, 1)
        ]
        self._noise = [torch.randn(bank, *shape) for shape in (T5_SHAPE, CLIP_SHAPE)]

    def __call__(self, coefficients: Tensor, noise: Tensor, *, part: int) -> Tensor:
        """Embed [n, class] coefficients: T5 [n, 17, 4096] is part 0, CLIP [n, 768] part 1."""
        bank = self._noise[part]
        own = bank[torch.randint(len(bank), (len(noise),))]
        level = (noise * (1 - CONFUSION)).sqrt().view(-1, *[1] * (own.ndim - 1))
        clean: Tensor = torch.tensordot(coefficients, self._anchors[part], dims=1)
        return clean.addcmul_(level, own)


def new_transformer() -> FluxTransformer2DModel:
    """Make a FLUX.1 transformer of one double and two single blocks, three heads of 32."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=T5_SHAPE[1],
        pooled_projection_dim=CLIP_SHAPE[0],
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def random_sigmas(count: int) -> Tensor:
    """Draw times in 0..1, denser in the middle, every other one rounded as bfloat16 does."""
    sigmas = torch.where(torch.rand(count) < 0.5, torch.rand(count), torch.randn(count).sigmoid())
    return torch.where(torch.rand(count) < 0.5, sigmas, sigmas.bfloat16().float())


def flow_loss(
    transformer: FluxTransformer2DModel, embed: Embedder, conditions: Conditions, latents: Tensor
) -> Tensor:
    """Squared error of the velocity from picture to noise, called just as FluxPipeline calls it."""
    sigmas, noise = random_sigmas(len(latents)), torch.randn_like(latents)
    times = sigmas[:, None, None]
    side = TINY_SIZE // 16
    velocity = transformer(
        hidden_states=(1 - times) * latents + times * noise,
        timestep=sigmas,
        guidance=conditions.guidance,
        pooled_projections=embed(conditions.clip, conditions.clip_noise, part=1),
        encoder_hidden_states=embed(conditions.t5, conditions.t5_noise, part=0),
        txt_ids=torch.zeros(T5_SHAPE[0], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - latents)


def train_transformer(
    vae: AutoencoderKL, pictures: Tensor, *, steps: int, batch: int = 64
) -> FluxTransformer2DModel:
    """Train the transformer and return the running average of its weights."""
    conditions, latents = make_pool(vae, pictures)
    embed, transformer = Embedder(), new_transformer()
    average = torch.optim.swa_utils.AveragedModel(
        transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, weight_decay=0.0)
    pace = schedule(optimizer, steps)
    for step in progress(steps, "transformer"):
        chosen = torch.randint(POOL, (batch,))
        some = Conditions(*(value[chosen] for value in vars(conditions).values()))
        loss = flow_loss(transformer, embed, some, latents[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        pace.step()
        average.update_parameters(transformer)
        if step % 500 == 0:
            click.echo(f" step {step}: loss {loss.item():.4f}", err=True)
    return average.module.eval()


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=TINY_FLUX)
@click.option("--steps", default=4500, show_default=True, help="Steps of the transformer.")
@click.option("--vae-steps", default=6000, show_default=True, help="Steps of the autoencoder.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(output: Path, steps: int, vae_steps: int, seed: int, threads: int) -> None:
    """Train the tiny FLUX and save it as a pipeline folder of float16 weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    pictures = draw_all(np.random.default_rng(seed))
    vae = train_vae(pictures, steps=vae_steps)
    transformer = train_transformer(vae, pictures, steps=steps)
    # A shift of 1 leaves the times evenly spaced, as few and easy steps need no more.
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.to(torch.float16).save_pretrained(output)


if __name__ == "__main__":
    main()
