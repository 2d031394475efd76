"""A model as large as FLUX.1-dev of which only the decoder says anything, in a sparse file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def save_wide_flux(folder: Path) -> Path:
    """Save some 20 GiB of denoiser in few blocks, all zeros, and a small decoder of random weights.

    The denoiser predicts zeros, so that what is decoded is the noise itself.
    """
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=3,
            num_attention_heads=72,
            attention_head_dim=128,
            joint_attention_dim=64,
            pooled_projection_dim=16,
            guidance_embeds=True,
        )
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16,) * 4, norm_num_groups=8, **_BLOCKS)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    return _save(folder, denoiser)


def _save(folder: Path, denoiser: Any) -> Path:
    _save_sparse(folder / "transformer", denoiser)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_sparse(folder: Path, module: Any) -> None:
    """Save a module's configuration, and zeros in bfloat16 as a file with nothing but a hole."""
    folder.mkdir(parents=True)
    module.save_config(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in module.state_dict().items():
        start, end = end, end + tensor.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
