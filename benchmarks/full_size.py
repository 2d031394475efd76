"""Models of full size whose weight files are sparse: right names, shapes and dtypes, no disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel

_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_DECODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_ENCODERS = {
    "flux-dev": {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5TokenizerFast",
    },
    "sdxl": {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
    },
    "sd15": {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "safety_checker": "CLIPModel",
        "feature_extractor": "CLIPImageProcessor",
    },
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a model of a published configuration, without its weights' values.

    It is FLUX.1-dev, Stable Diffusion XL or 1.5: ``"flux-dev"``, ``"sdxl"``, ``"sd15"``.
    """
    with torch.device("meta"):
        if name == "flux-dev":
            denoiser: Any = FluxTransformer2DModel(guidance_embeds=True)
            decoder = AutoencoderKL(
                **_DECODER,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        elif name == "sdxl":
            denoiser = UNet2DConditionModel(**_UNET_XL)
            decoder = AutoencoderKL(**_DECODER, scaling_factor=0.13025)
        else:
            denoiser = UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8
            )
            decoder = AutoencoderKL(**_DECODER, scaling_factor=0.18215)
    pipeline, part, scheduler = {
        "flux-dev": ("FluxPipeline", "transformer", "FlowMatchEulerDiscreteScheduler"),
        "sdxl": ("StableDiffusionXLPipeline", "unet", "EulerDiscreteScheduler"),
        "sd15": ("StableDiffusionPipeline", "unet", "PNDMScheduler"),
    }[name]
    for part_name, network in ((part, denoiser), ("vae", decoder)):
        _save_network(folder / part_name, network, dtype)
    shifting = {"use_dynamic_shifting": True} if name == "flux-dev" else {}
    skipping = {"skip_prk_steps": True} if name == "sd15" else {}
    _write(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": scheduler, "_diffusers_version": "0.42.0", **shifting, **skipping},
    )
    parts = {part: type(denoiser).__name__, "vae": "AutoencoderKL", "scheduler": scheduler}
    components = {each: ["diffusers", kind] for each, kind in parts.items()}
    # Not there: they are named since the pipeline refuses a folder that says nothing of them.
    components |= {each: ["transformers", kind] for each, kind in _ENCODERS[name].items()}
    _write(folder / "model_index.json", {"_class_name": pipeline, **components})
    return folder


def _save_network(folder: Path, network: Any, dtype: torch.dtype) -> None:
    config = {k: v for k, v in dict(network.config).items() if not k.startswith("_")}
    _write(folder / "config.json", {**config, "_class_name": type(network).__name__})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": _STORED[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)  # a hole, which reads as zeros and takes no disk


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, default=list))
