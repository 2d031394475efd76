"""What is asked of a run: one value for the command line, Python and ``--from-image``."""

# `_asked` is `dataclasses.field`, which the linter does not see.
# ruff: noqa: RUF009

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import WHOLE, Part
from fedgfe_store.models.placement import Dtype, Offload, Quantization

Noise = Literal["index", "file_id"]
"""What tells a sample from the others in the seed of its noise."""

OnStale = Literal["error", "regenerate", "keep"]
"""What becomes of images made with other settings."""

Pool = Literal["last", "first", "mean"]
"""How a CLIP sequence becomes a vector."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """How the command line asks for a field of `Request`; its type and default are the field's.

    Parameters
    ----------
    help : str
        What it says of it.
    flags : tuple of str
        How it is spelt, if not as the field: ``--image-size`` for ``image_size``.
    least, most : int, optional
        Bounds of a whole number.
    metavar : str, optional
        What stands for its value in the help.
    none : str, optional
        What is typed for None.
    of_image : bool
        Whether an image that is made again decides on it.
    """

    help: str
    flags: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    metavar: str | None = None
    none: str | None = None
    of_image: bool = False


def _asked(default: Any, help: str, **how: Any) -> Any:
    return field(default=default, metadata={"option": Option(help=help, **how)})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a run; what is None is decided by the model, the store or the machine.

    A field with a help text is an option of the command line too, in this order: nothing else has
    to be written for it there. Without one it is Python's only.
    """

    diffusion_type: str | None = _asked(
        None,
        "Family of the model, such as flux, sd or sdxl [what the model says].",
        flags=("--diffusion-type", "--diffusion_type"),
        metavar="FAMILY",
        of_image=True,
    )
    family: str | None = _asked(
        None, "File that declares a family of models that is not known.", metavar="FILE"
    )
    model: str | None = _asked(None, "Hub id, folder or tiny [$FEDGFE_MODEL, the store's].")
    steps: int | None = _asked(
        None,
        "Denoising steps [the model's: dev 28, schnell 4, tiny 8, Stable Diffusion 50].",
        flags=("--steps", "--num_inference_steps"),
        least=1,
        of_image=True,
    )
    guidance: float | None = _asked(
        None,
        "Guidance scale [the model's: dev 3.5, Stable Diffusion 7.5; schnell takes none].",
        flags=("--guidance", "--guidance_scale"),
        of_image=True,
    )
    negative: str | None = _asked(
        None,
        "Negative prompt, or embeddings in a file, where guidance takes one [empty prompt].",
        metavar="PROMPT|FILE",
    )
    column: tuple[str, ...] = _asked(
        (),
        "Take a column from the record of the same class and index of another node, round or "
        "split: t5=round:20, clip=node:text.",
        metavar="COLUMN=KEY:VALUE",
        of_image=True,
    )
    lora: tuple[str, ...] = _asked(
        (), "LoRA of the denoiser, a .safetensors file, and its scale [1].", metavar="FILE[:SCALE]"
    )
    height: int | None = _asked(None, "Pixels [the model's own].", least=1, of_image=True)
    width: int | None = _asked(None, "Pixels [the model's own].", least=1, of_image=True)
    pool: Pool = _asked(
        "last",
        "How a CLIP sequence becomes the model's vector, where the store holds sequences.",
        of_image=True,
    )
    seed: int = _asked(0, "Base seed of the noise.", of_image=True)
    images_per_record: int = _asked(
        1, "Images of each record, each from noise of its own.", least=1, most=10_000, of_image=True
    )
    dtype: Dtype | None = _asked(
        None, "What to compute in [bfloat16 on a GPU, float32 on the CPU].", of_image=True
    )
    quantize: Quantization | None = _asked(None, "Quantize the denoiser's weights.", of_image=True)
    device: str | None = _asked(None, "Such as cpu or cuda:1 [a GPU where there is one].")
    offload: Literal["auto"] | Offload = _asked(
        "auto", "What the GPU holds: all, denoiser or decoder, a few blocks, a layer."
    )
    batch_size: int | None = _asked(
        None,
        "Images per call of the model; auto goes by their size and the GPU's memory.",
        flags=("--batch-size", "--batch_size"),
        metavar="N",
        none="auto",
    )
    compiled: bool = _asked(False, "Compile the denoiser's blocks.", flags=("--compile",))
    vae_tiling: bool = _asked(False, "Decode tile by tile what does not fit the memory.")
    clear_cache_every: int | None = _asked(
        None,
        "Give the GPU's cache back after every N batches.",
        flags=("--clear-cache-every", "--clear_cache_every"),
        least=1,
        metavar="N",
    )
    part: Part = _asked(
        WHOLE,
        "Render part I of N, from 0; auto: what the task of a SLURM array says, auto/N of N parts "
        "[what torchrun, accelerate or srun say].",
        flags=("--part", "--shard"),
        metavar="I/N|auto",
        of_image=True,
    )
    limit: int | None = _asked(None, "Render at most so many images now.", least=0, of_image=True)
    on_stale: OnStale = _asked(
        "error", "What to do about images made with other settings.", of_image=True
    )
    replace_others: bool = _asked(False, "Replace images of other experiments in the folder, too.")
    noise: Noise | None = None
    """What tells a sample from the others in its seed: by default the rule of the folder's images,
    and ``"file_id"`` in a new folder; see `Settings`."""
    only_image: int | None = None
    """Only this image of each record, from 0."""
    again: bool = False
    """Render images that are done, too."""
    local: int | None = None
    """Which GPU is this process's, where several share a machine."""

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            known = ", ".join(get_args(Pool))
            raise SchemaMismatchError(f"pool: expected one of {known}, got {self.pool!r}")
        if self.on_stale not in get_args(OnStale):
            known = "error, regenerate or keep"
            raise SchemaMismatchError(f"on_stale: expected {known}, got {self.on_stale!r}")
        for name in ("steps", "images_per_record", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise SchemaMismatchError(f"{name}: expected at least 1, got {number}")
        guidance = self.guidance
        if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
            raise SchemaMismatchError(f"guidance: expected a number from 0 up, got {guidance}")

    @property
    def numbers(self) -> Sequence[int]:
        """Which images of each record are asked for, from 0."""
        return range(self.images_per_record) if self.only_image is None else (self.only_image,)


DEFAULTS = Request()
"""What is asked where nothing is said."""


class RequestOptions(TypedDict, total=False):
    """The fields of `Request`, which a test compares, as type checkers see keywords of them."""

    diffusion_type: str | None
    family: str | None
    model: str | None
    steps: int | None
    guidance: float | None
    negative: str | None
    column: tuple[str, ...]
    lora: tuple[str, ...]
    height: int | None
    width: int | None
    pool: Pool
    seed: int
    images_per_record: int
    dtype: Dtype | None
    quantize: Quantization | None
    device: str | None
    offload: Literal["auto"] | Offload
    batch_size: int | None
    compiled: bool
    vae_tiling: bool
    clear_cache_every: int | None
    part: Part
    limit: int | None
    on_stale: OnStale
    replace_others: bool
    noise: Noise | None
    only_image: int | None
    again: bool
    local: int | None
