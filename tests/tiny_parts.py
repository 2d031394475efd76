"""The parts of tiny image models: diffusers' own denoisers, decoders and schedulers."""

from __future__ import annotations

from typing import Any, TypeVar

import diffusers
import torch

Parts = dict[str, Any]
Module = TypeVar("Module", bound=torch.nn.Module)


def lively(module: Module, factor: float = 2.0) -> Module:
    """Enlarge weights, for what goes in to be visible in what comes out.

    Training does that; fresh weights nearly ignore their conditioning, and some are zero.
    """
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.5)
            elif weight.ndim > 1:
                # bfloat16 rounds guidance to a hundredth of it, which trained models hardly notice.
                weight.mul_(0.5 if "guidance_embedder" in name else factor)
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
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.8, 1.2, 1.5, 1.0],
    )
    # Its norms are over the channels of a place: with larger weights rounding shows, too.
    return lively(vae, 1.4)


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


def flux(*, guidance_embeds: bool) -> Parts:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    return {"transformer": lively(transformer), "vae": kl(shift=0.1), "scheduler": flow()}


def chroma() -> Parts:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return {"transformer": lively(transformer), "vae": kl(shift=0.1), "scheduler": flow()}


def flux2(width: int, *, guidance_embeds: bool) -> Parts:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {"transformer": lively(transformer), "vae": kl_of_flux2(), "scheduler": flow()}


def sd(width: int) -> Parts:
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **beta)
    denoiser = unet(cross_attention_dim=width, attention_head_dim=4)
    return {"unet": denoiser, "vae": kl(), "scheduler": scheduler}


def sdxl(scheduler: Any, **options: Any) -> Parts:
    denoiser = unet(
        cross_attention_dim=2048,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=1280 + 6 * 8,
        **options,
    )
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return {"unet": denoiser, "vae": kl(), "scheduler": scheduler(**beta)}


def sdxl_turbo() -> Parts:
    parts = sdxl(diffusers.EulerAncestralDiscreteScheduler)
    scheduler = parts["scheduler"]
    trailing = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    return parts | {"scheduler": trailing}


def sd3() -> Parts:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=3.0),
    }


def pixart(*, conditions: bool) -> Parts:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=4096,
        use_additional_conditions=conditions,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return {"transformer": lively(transformer), "vae": kl(), "scheduler": scheduler}


def sana() -> Parts:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
    )
    return {
        "transformer": lively(transformer),
        "vae": deep_compression(),
        "scheduler": flow(shift=3.0),
    }


def lumina2() -> Parts:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=2304,
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=6.0),
    }


def qwen() -> Parts:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
    )
    return {"transformer": lively(transformer), "vae": kl_of_qwen(), "scheduler": flow()}


def zimage() -> Parts:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=3.0),
    }
