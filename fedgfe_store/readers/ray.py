"""A selection as a Ray Data dataset: its workers read the records by their row numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.readers.columns import batch_columns
from fedgfe_store.records import KEY_COLUMNS

if TYPE_CHECKING:
    from ray.data import Dataset

    from fedgfe_store.rows import Rows

# A task of Ray takes milliseconds, which do not show beside reading this much; and Ray holds a
# block several times while it passes it on.
_BLOCK_BYTES = 64 * 2**20


def to_ray(selection: Rows, columns: Sequence[str] | None = None) -> Dataset:
    """Return `selection` as `Selection.to_ray` describes it."""
    names = batch_columns(selection.schema, columns)
    data = extra("ray.data", "to_ray", "ray")
    known = selection.schema.columns
    nbytes = sum(selection.schema.column(name).nbytes for name in names if name in known)
    size = max(1, _BLOCK_BYTES // max(1, nbytes))
    starts = [{"start": start} for start in range(0, max(1, len(selection)), size)]
    # Without what was read of it here, such as its frame.
    rows = selection.take(slice(None))
    return data.from_items(starts, override_num_blocks=len(starts)).map_batches(
        partial(_read, rows, names, size), batch_size=1
    )


def _read(
    selection: Rows, names: Sequence[str], size: int, batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    start = int(batch["start"][0])
    part = selection.take(slice(start, start + size))
    keys = {name: _plain(part.column(name)) for name in KEY_COLUMNS}
    return {**keys, **{name: part.read(name) for name in names}}


def _plain(values: np.ndarray) -> np.ndarray:
    """Return text as Python's own: Arrow takes none of numpy's."""
    return values.astype(object) if values.dtype.kind == "T" else values
