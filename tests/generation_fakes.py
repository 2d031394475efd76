"""A stand-in image model that says what it was given, and a small random FLUX."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement, Sampling

SIZE = 32
NO_ENCODERS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def save_random_flux(
    folder: Path,
    *,
    width: int = 8,
    clip: int = 4,
    guidance: bool = True,
    seed: int = 0,
    encoders: bool = False,
) -> Path:
    """Save a FLUX of random weights, whose pictures depend visibly on all that goes in."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=width,
        pooled_projection_dim=clip,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(2.0)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        **(_flux_encoders(folder.parent, width, clip) if encoders else NO_ENCODERS),
    )
    pipeline.save_pretrained(folder)
    return folder


def _flux_encoders(folder: Path, width: int, clip: int) -> dict[str, object]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return {
        "text_encoder": random_clip(clip, 77),
        "tokenizer": letters(folder, 77),
        "text_encoder_2": T5EncoderModel(config),
        "tokenizer_2": T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512),
    }


def load_flux(folder: Path, **options: object) -> FluxPipeline:
    """Load a model with diffusers alone, as the reference to compare with."""
    pipeline = FluxPipeline.from_pretrained(folder, **NO_ENCODERS, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def checksum(t5: NDArray[np.float32], clip: NDArray[np.float32], seed: int) -> bytes:
    """Three bytes that tell which embeddings and seed a picture was made from."""
    content = t5.tobytes() + clip.tobytes() + seed.to_bytes(8, "big")
    return zlib.crc32(content).to_bytes(4, "big")[:3]


class FakePipeline:
    """Paints each picture in the colour of the checksum of what it was conditioned on.

    The latents of the records numbered `bad_latents`, counted as they come, are NaN; so is what
    becomes of the colours `bad_pixels` as they are decoded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batches_per_swap: int = 1,
        bad_latents: Collection[int] = (),
        bad_pixels: Collection[bytes] = (),
    ) -> None:
        self.model: Model = resolve_model(str(folder))
        self.placement = Placement("float32", "cpu")
        self.batches_per_swap = batches_per_swap
        self.bad_latents, self.bad_pixels = bad_latents, bad_pixels
        self.calls: list[str] = []
        self.batch_sizes: list[int] = []
        self.inputs: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None],
    ) -> torch.Tensor:
        self.calls.append("denoise")
        self.batch_sizes.append(len(seeds))
        for _ in range(settings.steps):
            on_step()
        pairs = [(t5.numpy(), clip.numpy()) for t5, clip in zip(*embeddings.values(), strict=True)]
        result = torch.empty(len(seeds), 3)
        for row, (seed, pair) in enumerate(zip(seeds, pairs, strict=True)):
            spoilt = len(self.inputs) in self.bad_latents
            self.inputs[seed] = pair
            result[row] = torch.nan if spoilt else torch.tensor(list(checksum(*pair, seed)))
        return result

    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool
    ) -> list[NDArray[np.uint8] | None]:
        self.calls.append("decode")
        pictures = []
        for colour in latents.numpy().astype(np.uint8):
            spoilt = colour.tobytes() in self.bad_pixels
            pictures.append(
                None if spoilt else np.tile(colour, (settings.height, settings.width, 1))
            )
        return pictures

    def place(self, placement: Placement) -> None:
        self.placement = placement


def save_random_sd(
    folder: Path, *, width: int = 8, tokens: int = 77, seed: int = 0, encoder: bool = True
) -> Path:
    """Save a Stable Diffusion of random weights, with a text encoder and without safety checker."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            weight.mul_(4.0 if "attn2" in name else 1.5)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=random_clip(width, tokens) if encoder else None,
        tokenizer=letters(folder.parent, tokens) if encoder else None,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def random_clip(width: int, tokens: int) -> CLIPTextModel:
    """Make a text encoder for `letters`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            bos_token_id=52,
            eos_token_id=53,
        )
    )


def letters(folder: Path, tokens: int) -> CLIPTokenizer:
    """Make a tokenizer that knows the letters."""
    words = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=tokens)


def save_random_clip(folder: Path) -> Path:
    """Save a CLIP of random weights for pictures of 16 x 16 and prompts of letters."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **sizes,
        vocab_size=54,
        num_hidden_layers=1,
        max_position_embeddings=40,
        bos_token_id=52,
        eos_token_id=53,
    )
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=16, patch_size=4)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )
    torch.manual_seed(4)
    with torch.no_grad():
        # Weights as small as those of training's start give nearly the same vector for all.
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop)
    CLIPProcessor(images, letters(folder.parent, 40)).save_pretrained(folder)
    return folder


def load_sd(folder: Path, **options: object) -> StableDiffusionPipeline:
    """Load a model whole with diffusers alone, as the reference to compare with."""
    left_out = {"safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, **left_out, requires_safety_checker=False, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
