"""Quantizing the denoising network's weights, where the machine can."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, get_args

import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.placement import Quantization

WEIGHT_SHARE: dict[str | None, float] = {None: 1.0, "nf4": 0.28, "fp8": 0.5, "fp8-cast": 0.5}
"""What is left of 16-bit weights; nf4 has 4 bits and a float32 scale for 64 weights, 4.5 of 16."""

PACKAGES = {"nf4": "bitsandbytes", "fp8": "torchao"}
"""The package that each needs, if any; ``fedgfe-store[nf4]`` and ``[fp8]`` bring them."""

# Ada and Hopper are the first that multiply 8-bit floats.
_FP8_CAPABILITY = (8, 9)


def check_quantization(name: str, *, device: str, dtype: str, compiled: bool) -> Quantization:
    """Refuse a quantization that this machine cannot do, or could not do fast enough to be of use.

    Parameters
    ----------
    name : {"nf4", "fp8", "fp8-cast"}
        4-bit NormalFloat of bitsandbytes; 8-bit floats of torchao, activations included; 8-bit
        floats that each layer casts to `dtype` before it works.
    device : str
        Where to compute.
    dtype : {"float32", "bfloat16", "float16"}
        What to compute in.
    compiled : bool
        Whether the network is compiled.

    Raises
    ------
    SchemaMismatchError
        The reason.
    """
    if name not in get_args(Quantization):
        raise SchemaMismatchError(f"quantize: expected nf4, fp8 or fp8-cast, got {name!r}")
    reason = _missing(name, device, dtype, compiled)
    if reason:
        raise SchemaMismatchError(f"quantize {name}: {reason}")
    return name  # type: ignore[return-value]


def _missing(name: str, device: str, dtype: str, compiled: bool) -> str | None:
    if name == "fp8-cast":
        return "expected no --compile, whose graphs know nothing of the casts" if compiled else None
    if torch.device(device).type != "cuda":
        return f"expected a CUDA device, got {device}"
    if find_spec(PACKAGES[name]) is None:
        install = f"pip install 'fedgfe-store[{name}]'"
        return f"expected the package {PACKAGES[name]} ({install}), got none"
    if name == "nf4":
        return None
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability < _FP8_CAPABILITY:
        return (
            "expected a card of compute capability 8.9 or newer, which computes in 8-bit floats, "
            f"got {capability[0]}.{capability[1]}"
        )
    if dtype != "bfloat16":
        return f"expected dtype bfloat16, which torchao scales row by row, got {dtype}"
    if not compiled:
        return "expected --compile too; without it a picture takes minutes"
    return None


def quantization_config(name: Quantization, dtype: torch.dtype) -> Any:
    """Say to diffusers how weights are kept.

    Parameters
    ----------
    name : {"nf4", "fp8"}
        How to keep them.
    dtype : torch.dtype
        What nf4 is unpacked to.
    """
    import diffusers

    if name == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return diffusers.TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def cast_layerwise(network: Any, dtype: torch.dtype) -> None:
    """Keep a network's weights in 8-bit floats that each layer casts before it works.

    Parameters
    ----------
    network : diffusers.ModelMixin
        The network; what diffusers knows to need precision, such as norms, stays as it is.
    dtype : torch.dtype
        What to compute in.
    """
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
