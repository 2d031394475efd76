"""Negative embeddings as values: by argument, with a digest that tells them from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from fedgfe_store.errors import SchemaMismatchError

Values = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Negative:
    """What classifier-free guidance leads away from.

    Parameters
    ----------
    values : mapping
        By the argument of the model's pipeline, without ``negative_``: float32
        ``[tokens, features]`` or ``[features]``, and masks as bool ``[tokens]``.
    digest : str
        What tells them from others, 16 hex digits: xxh3 of the bytes of a sequence, where that is
        all; else of all values with their names and shapes. Those of a prompt keep the digest of
        what was encoded where a store rounds them.
    source : str
        Where they are from, for people.
    """

    values: Values
    digest: str
    source: str

    @classmethod
    def of(cls, values: Values, source: str, digest: str | None = None) -> Self:
        """Return checked embeddings.

        Raises
        ------
        SchemaMismatchError
            If a value is not finite.
        """
        for argument, value in values.items():
            if not np.isfinite(value).all():
                raise SchemaMismatchError(
                    f"negative embeddings ({source}): expected finite values, got others in "
                    f"{argument} {list(value.shape)}"
                )
        return cls(values, digest or digest_of(values), source)


def digest_of(values: Values) -> str:
    """Hash embeddings: 16 hex digits. One sequence is hashed as its bytes alone."""
    if len(values) == 1:
        (only,) = values.values()
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(only).data)
    found = xxhash.xxh3_64()
    for argument, value in sorted(values.items()):
        found.update(f"{argument} {value.dtype} {list(value.shape)}\n".encode())
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()
