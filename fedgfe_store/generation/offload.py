"""Where the weights lie while images are made, decided from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.models import Model

Offload = Literal["none", "model"]

_RESERVE_BYTES = 256 * 2**20
# Tensors of the model's width that a FLUX block holds at once per token: the residual, q, k, v
# with their rotated float32 copies, the four-fold hidden layer before and after its activation.
_TENSORS_PER_TOKEN = 24
# Feature maps at full resolution that the decoder's last blocks hold at once.
_MAPS_PER_PIXEL = 5


@dataclass(frozen=True)
class Footprint:
    """Device memory in bytes: weights, and what work on one batch needs besides."""

    transformer: int
    vae: int
    denoising: int
    decoding: int

    def needed(self, offload: Offload) -> int:
        """Give the peak under an offload mode."""
        if offload == "none":
            peak = self.transformer + self.vae + max(self.denoising, self.decoding)
        else:
            peak = max(self.transformer + self.denoising, self.vae + self.decoding)
        return peak + _RESERVE_BYTES


def estimate_footprint(
    model: Model, *, item_bytes: int, batch_size: int, tokens: int, height: int, width: int
) -> Footprint:
    """Estimate a run's device memory from its weight files and the size of its pictures.

    Parameters
    ----------
    model : Model
        The model; its weights have to be on disk.
    item_bytes : int
        Bytes of a number in the dtype that it runs in.
    batch_size, tokens : int
        Records of a batch, and T5 tokens of a record.
    height, width : int
        Picture size in pixels.

    Returns
    -------
    Footprint
        Bytes.
    """
    config = model.transformer
    features = config["num_attention_heads"] * config["attention_head_dim"]
    sequence = tokens + height * width // model.pixels_per_token**2
    channels = max(model.vae["block_out_channels"][:2])
    return Footprint(
        transformer=model.parameters("transformer") * item_bytes,
        vae=model.parameters("vae") * item_bytes,
        denoising=batch_size * sequence * features * _TENSORS_PER_TOKEN * item_bytes,
        decoding=batch_size * height * width * channels * _MAPS_PER_PIXEL * item_bytes,
    )


def choose_offload(
    wanted: str, *, device_type: str, free_bytes: int | None, footprint: Footprint
) -> tuple[Offload, str | None]:
    """Decide on an offload mode.

    Parameters
    ----------
    wanted : {"auto", "none", "model"}
        ``"auto"`` is the first of the others that fits.
    device_type : str
        ``"cpu"``, ``"cuda"``, ...; on the CPU nothing is offloaded.
    free_bytes : int or None
        Free memory of the device; None where it is not known, so that everything is put there.
    footprint : Footprint
        What the run needs.

    Returns
    -------
    mode : {"none", "model"}
        The decision.
    remark : str or None
        One line for the user where it is not simply what was asked for.

    Raises
    ------
    SchemaMismatchError
        If `wanted` is unknown.
    """
    if wanted != "auto" and wanted not in get_args(Offload):
        raise SchemaMismatchError(f"offload: expected auto, none or model, got {wanted!r}")
    if device_type == "cpu":
        return "none", None if wanted == "none" else f"offload: {wanted} is ignored on the CPU"
    if wanted == "none" or (wanted == "auto" and free_bytes is None):
        return "none", None
    if wanted == "model" or free_bytes is None:
        return "model", None
    for mode in get_args(Offload):
        if footprint.needed(mode) <= free_bytes:
            return mode, None if mode == "none" else f"offload: {mode}"
    return "model", (
        f"offload: model, though the run may need {_gib(footprint.needed('model'))} "
        f"and {_gib(free_bytes)} are free"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
