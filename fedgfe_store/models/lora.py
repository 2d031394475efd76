"""LoRA: small changes of a denoiser's weights, in files of their own."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite, prod
from pathlib import Path
from typing import Any, Self

import xxhash

from fedgfe_store.common.location import seen_from
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import first_line
from fedgfe_store.models.loading import loading
from fedgfe_store.models.model import Model

# How files begin the names of text encoders' weights: diffusers' and peft's, and kohya's.
_OF_ENCODERS = ("text_encoder", "lora_te")
# The matrices of LoRA and LoKr in the layouts that diffusers reads; all else are scales.
_MATRIX = re.compile(r"lora(_linear_layer)?[._](A|B|down|up)\b|lokr_")
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Lora:
    """A LoRA that is asked for.

    Parameters
    ----------
    path : Path
        Its file.
    digest : str
        xxh3 of the file, 32 hex digits.
    scale : float
        How much of it is added to the weights; 1 is what it was trained for.
    numbers : int
        How many it adds to the denoiser's.
    """

    path: Path
    digest: str
    scale: float = 1.0
    numbers: int = 0

    @classmethod
    def read(cls, text: str) -> Self:
        """Find the file of ``FILE[:SCALE]`` and digest it.

        Raises
        ------
        NotFoundError
            If there is no such file.
        SchemaMismatchError
            If it is no ``.safetensors`` file, or has nothing for a denoiser.
        """
        name, scale = text, 1.0
        front, colon, end = text.rpartition(":")
        if colon and not Path(text).expanduser().is_file():
            name, scale = front, _scale(text, end)
        path = Path(name).expanduser()
        if not path.is_file():
            raise NotFoundError(f"lora: expected a file {path}, got none")
        matrices = {key: n for key, n in _sizes(path).items() if _MATRIX.search(key)}
        numbers = sum(n for key, n in matrices.items() if _is_of_denoiser(key))
        if not numbers:
            got = "those of text encoders only" if matrices else "none"
            raise SchemaMismatchError(f"lora {path}: expected weights of a denoiser, got {got}")
        return cls(path, _digest(path), scale, numbers)

    @property
    def identity(self) -> str:
        """What tells it from others, whatever its file is called: digest and scale."""
        return f"{self.digest}:{self.scale}"

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return it as the images of a folder keep it."""
        file = seen_from(self.path, folder)
        return {"file": file, "digest": self.digest, "scale": self.scale}


def _scale(text: str, end: str) -> float:
    try:
        scale = float(end)
    except ValueError:
        scale = float("nan")
    if not isfinite(scale):
        raise SchemaMismatchError(f"lora: expected FILE or FILE:SCALE, got {text!r}")
    return scale


def _sizes(path: Path) -> dict[str, int]:
    """Give how many numbers each tensor of a file has."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: prod(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise SchemaMismatchError(
            f"lora: expected a .safetensors file {path}, got another: {first_line(error)}"
        ) from error


def _is_of_denoiser(key: str) -> bool:
    return not key.startswith(_OF_ENCODERS)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_loras(loras: Sequence[Lora], model: Model, quantization: str | None) -> None:
    """Refuse LoRA where it is not possible, before any weights are loaded.

    Raises
    ------
    SchemaMismatchError
        The reason.
    """
    if not loras:
        return
    import diffusers

    if find_spec("peft") is None:
        install = "pip install 'fedgfe-store[lora]'"
        raise SchemaMismatchError(f"lora: expected the package peft ({install}), got none")
    if not hasattr(getattr(diffusers, model.pipeline_class, None), "load_lora_weights"):
        raise SchemaMismatchError(
            f"lora: expected a pipeline that takes one, got {model.pipeline_class} of the model "
            f"{model.name}"
        )
    if quantization:
        raise SchemaMismatchError(
            f"lora: expected weights that are not quantized, got quantize {quantization}"
        )


def apply_loras(pipeline: Any, model: Model, loras: Sequence[Lora]) -> None:
    """Add LoRA to a pipeline's denoiser, as diffusers does; what is for text encoders is left out.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Weights on the host, and not yet moved by anything.
    model : Model
        What it was loaded from.
    loras : sequence of Lora
        Several are added up.

    Raises
    ------
    SchemaMismatchError
        If one does not fit, which leaves out none of its weights.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        with (
            loading(f"lora {lora.path}, for the model {model.name},"),
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,
        ):
            # Of the second one peft remarks that there are two.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            file = _without_encoders(lora.path, Path(folder))
            wanted = sum(bool(_MATRIX.search(key)) for key in _sizes(file))
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            _check_complete(getattr(pipeline, model.part), name, wanted, lora, model)
    if names:
        pipeline.set_adapters(names, [lora.scale for lora in loras])


def _without_encoders(path: Path, folder: Path) -> Path:
    """Give a file of the denoiser's weights alone: diffusers would miss the encoders."""
    if all(map(_is_of_denoiser, _sizes(path))):
        return path.resolve()
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in filter(_is_of_denoiser, file.keys())}
        save_file(kept, folder / "lora.safetensors", metadata=file.metadata())
    return folder / "lora.safetensors"


def _check_complete(denoiser: Any, name: str, wanted: int, lora: Lora, model: Model) -> None:
    """Refuse what diffusers only remarks on: weights of layers that the denoiser does not have."""
    parts = (key.split(".") for key, _ in denoiser.named_parameters())
    found = sum(name in part for part in parts)
    # Of matrices that several layers share, each layer has its own.
    if found < wanted:
        raise SchemaMismatchError(
            f"lora {lora.path}: expected weights of the {model.part_title} of {model.name}, got "
            f"{wanted - found} of {wanted} for layers that it does not have"
        )
