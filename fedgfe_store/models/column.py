"""A column of conditioning, as a family declares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ColumnKind = Literal["sequence", "vector", "mask", "lengths"]
"""What a column of conditioning is."""

MaskDtype = Literal["int64", "bool", "float"]
"""What a mask is passed as; ``"float"`` is the dtype that the denoiser computes in."""


@dataclass(frozen=True)
class Column:
    """A column of conditioning.

    Parameters
    ----------
    argument : str
        The pipeline's argument that it is; of ``"lengths"``, the name of a mask that no argument
        takes.
    kind : {"sequence", "vector", "mask", "lengths"}
        ``[tokens, width]``, ``[width]`` or ``[tokens]``; with ``"lengths"`` the pipeline takes a
        list of sequences, cut to the tokens that the mask has.
    width : str or int
        Key of the denoiser's configuration that gives the width, or the width.
    also : tuple of str
        Other names that stores know it by.
    dtype : {"int64", "bool", "float"}
        What a mask is passed as.
    first : bool
        Whether the ones of a mask have to come first, since the pipeline takes their number as a
        length.
    """

    argument: str
    kind: ColumnKind
    width: str | int = ""
    also: tuple[str, ...] = ()
    dtype: MaskDtype = "int64"
    first: bool = False

    @property
    def is_mask(self) -> bool:
        """Whether it says which tokens count."""
        return self.kind in ("mask", "lengths")

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a store may know it by."""
        return (self.argument, *self.also)

    def takes(self, mask: NDArray[Any]) -> bool:
        """Whether masks ``[..., tokens]`` are such as the pipeline counts as they are meant."""
        lengths = (mask != 0).sum(axis=-1, keepdims=True)
        return not self.first or bool((mask == (np.arange(mask.shape[-1]) < lengths)).all())
