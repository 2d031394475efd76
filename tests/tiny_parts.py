"""The parts of tiny image models: decoders, U-Nets and schedulers of diffusers' own classes."""

from __future__ import annotations

from typing import Any, TypeVar

import diffusers
import torch

Module = TypeVar("Module", bound=torch.nn.Module)


def lively(module: Module, factor: float = 2.0) -> Module:
    """Enlarge weights, for what goes in to be visible in what comes out.

    Training does that; fresh weights nearly ignore their conditioning, and some are zero.
    """
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.5)
            elif weight.ndim > 1:
                weight.mul_(factor)
    return module


def flow(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Make the scheduler of models that learned a flow."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def kl(*, shift: float | None = None) -> diffusers.AutoencoderKL:
    """Make the decoder of most families: 4 channels, 8 pixels a latent."""
    return lively(
        diffusers.AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            scaling_factor=0.7,
            shift_factor=shift,
        )
    )


def kl_of_flux2() -> diffusers.AutoencoderKLFlux2:
    """Make a decoder with statistics of packed latents that are neither 0 nor 1."""
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return lively(vae)


def kl_of_qwen() -> diffusers.AutoencoderKLQwenImage:
    """Make a decoder of one frame, with means and deviations of its own for each channel."""
    return lively(
        diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.8, 1.2, 1.5, 1.0],
        )
    )


def deep_compression() -> diffusers.AutoencoderDC:
    """Make Sana's decoder, of 8 pixels a latent where the real one has 32."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    return lively(
        diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
    )


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """Make a U-Net with attention to the conditioning in its lower half."""
    return lively(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **options,
        )
    )
