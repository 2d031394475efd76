"""How a model is loaded and where its weights lie, and what goes in and out of it then: values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

if TYPE_CHECKING:
    # The command line takes its choices from here, and its help must not wait for torch.
    import numpy as np
    from numpy.typing import NDArray

    from fedgfe_store.models.lora import Lora

Dtype = Literal["float32", "bfloat16", "float16"]
"""What to compute in."""

Offload = Literal["none", "model", "group", "sequential"]
"""Where weights wait while they do nothing, from most to least device memory."""

Quantization = Literal["nf4", "fp8", "fp8-cast"]
"""How the denoising network's weights are kept, if not in the dtype that it computes in."""

PACKED = ("nf4", "fp8")
"""Those whose weights are packed on the device, where they stay."""

# Moving a network of billions of parameters takes seconds, and a batch's latents take next to no
# memory; what waits for the decoder is lost where a process is killed, so there is an end to it.
SWAP_BATCHES = 16
"""Batches that are denoised before the decoder takes the denoiser's place, under ``"model"``."""

Picture: TypeAlias = "NDArray[np.uint8]"
"""An image, uint8 ``[height, width, 3]``."""


def possible_offloads(compiled: bool, quantization: str | None) -> tuple[Offload, ...]:
    """Give the offload modes that a compiled or a quantized network works under."""
    # bitsandbytes and torchao pack weights on the device, and their tensors do not move as others.
    if quantization in PACKED:
        return ("none",)
    if quantization is not None:
        # Hooks of accelerate and those that cast do not know one another.
        return ("none", "model", "group")
    # The hooks that move blocks and layers break up the graph that is compiled.
    return ("none", "model") if compiled else get_args(Offload)


class Sampling(Protocol):
    """What a pipeline is told of an image besides its embeddings and its seed.

    Attributes
    ----------
    steps : int
        Denoising steps.
    guidance : float or None
        Guidance scale; None for a model that takes none.
    height, width : int
        Size of the image in pixels.
    """

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def guidance(self) -> float | None: ...  # noqa: D102
    @property
    def height(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Placement:
    """How a model's weights are loaded, and where they lie while it works.

    Parameters
    ----------
    dtype : {"float32", "bfloat16", "float16"}
        What to compute in.
    device : str
        Where.
    offload : {"none", "model", "group", "sequential"}
        Where the weights wait meanwhile.
    compiled : bool
        Whether the denoising network's blocks are compiled.
    quantization : {"nf4", "fp8", "fp8-cast"}, optional
        How the denoising network's weights are kept.
    resident : tuple of str
        Blocks that stay on the device under ``"group"``.
    pinned : bool
        Whether blocks wait in pinned memory of the host under ``"group"``. If not, single layers
        move, and are pinned on their way.
    loras : tuple of Lora
        What is added to its weights.
    """

    dtype: str
    device: str
    offload: Offload = "none"
    compiled: bool = False
    quantization: Quantization | None = None
    resident: tuple[str, ...] = ()
    pinned: bool = True
    loras: tuple[Lora, ...] = ()

    def describe(self, doing: str) -> str:
        """Say what is done where and how, for errors."""
        kept = self.quantization or self.dtype
        return f"{doing} in {kept} on {self.device}, offload {self.offload}"

    def remedy(
        self,
        modes: Sequence[Offload] = get_args(Offload),
        otherwise: str = "a GPU with more free memory",
    ) -> str:
        """Say what takes less memory than this, for errors.

        Parameters
        ----------
        modes : sequence of str
            Offload modes that there are.
        otherwise : str
            What helps where no mode does.
        """
        if self.device == "cpu" or self.device.startswith("cpu:"):
            smaller = " or --dtype bfloat16" if self.dtype == "float32" else ""
            return f"a machine with more memory{smaller} may help"
        possible = possible_offloads(self.compiled, self.quantization)
        others = [mode for mode in modes[modes.index(self.offload) + 1 :] if mode in possible]
        if not others:
            return f"{otherwise} may help"
        return f"--offload {' or '.join(others)} may help"
