"""Reading the embeddings of a run's images batch by batch, each image claimed before it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgfe_store.errors import DamagedDataError, NotFoundError
from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.plan import PlanItem, look_again
from fedgfe_store.generation.prepare import Run
from fedgfe_store.images.identity import record_digests
from fedgfe_store.records import KEY_COLUMNS
from fedgfe_store.store import EmbeddingStore

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection


@dataclass(frozen=True)
class Batch:
    """Embeddings of some images, one row each, and what became of others on the way.

    Parameters
    ----------
    items : tuple of PlanItem
        Images to render.
    embeddings : dict
        By column; float32 ``[images, ...]``.
    damaged : dict
        Images whose record is damaged, and how; or that another run has put another image in
        place of meanwhile.
    elsewhere : tuple of PlanItem
        Images that another process has made since they were planned, or is making now.
    """

    items: tuple[PlanItem, ...]
    embeddings: dict[str, torch.Tensor]
    damaged: dict[PlanItem, str]
    elsewhere: tuple[PlanItem, ...] = ()


def read_batches(run: Run, claims: Claims) -> Iterator[Batch]:
    """Read what a run has to do.

    Parameters
    ----------
    run : Run
        The run.
    claims : Claims
        Claims of its folder; an image is claimed as its batch is read, and stays so.

    Yields
    ------
    Batch
        Full batches, but for the last.
    """
    for part in _claimed(run, claims):
        batch = _read(run, part.taken) if part.taken else Batch((), {}, {})
        damaged = {**part.refused, **batch.damaged}
        yield Batch(batch.items, batch.embeddings, damaged, tuple(part.made))


@dataclass
class _Part:
    """Images that were claimed, those that others made or make, and those that are refused."""

    taken: list[PlanItem] = field(default_factory=list)
    made: list[PlanItem] = field(default_factory=list)
    refused: dict[PlanItem, str] = field(default_factory=dict)


def _claimed(run: Run, claims: Claims) -> Iterator[_Part]:
    """Take images in the plan's order; try those that others hold once more at the end."""
    held: list[PlanItem] = []
    part = _Part()
    for last_try, items in ((False, run.plan.todo), (True, held)):
        for item in items:
            if not claims.take(item.path.name, wait=last_try):
                (part.made if last_try else held).append(item)
                continue
            found = look_again(item, run.plan)
            refused = found is not None and run.plan.refuses(found)
            kept = refused and run.request.on_stale == "keep"
            if found is not None and (kept or found.item.status == "done"):
                claims.release(item.path.name)
                part.made.append(item)
            elif found is not None and refused:
                part.refused[item] = f"{found.verdict.conflict}: made meanwhile by another run"
            else:
                part.taken.append(item)
            if len(part.taken) == run.batch_size:
                yield part
                part = _Part()
    if part.taken or part.made or part.refused:
        yield part


def _read(run: Run, items: Sequence[PlanItem]) -> Batch:
    damaged: dict[PlanItem, str] = {}
    columns = tuple(run.columns.values())
    try:
        rows = _rows(run.selection, items, columns)
    except DamagedDataError:
        # One bad record must not take its neighbours along: find it by reading each alone.
        sound = []
        for item in items:
            try:
                sound.append((item, _rows(run.selection, [item], columns)))
            except DamagedDataError as error:
                damaged[item] = str(error)
        items = [item for item, _ in sound]
        rows = {c: np.concatenate([row[c] for _, row in sound]) for c in columns if sound}
    embeddings = _conditioning(run, rows, len(items)) if rows else {}
    return Batch(tuple(items), embeddings, damaged)


def _conditioning(
    run: Run, rows: Mapping[str, NDArray[Any]], images: int
) -> dict[str, torch.Tensor]:
    """Give what was read by the arguments of the model's pipeline."""
    found = {argument: torch.from_numpy(rows[name]) for argument, name in run.columns.items()}
    pool = run.plan.settings.pool
    if pool is not None:
        for column in run.model.family.columns:
            if column.kind == "vector" and found[column.argument].ndim == 3:
                found[column.argument] = _pooled(found[column.argument], pool)
    if run.negative is not None:
        negative = torch.from_numpy(run.negative.values)
        found["negative_prompt_embeds"] = negative.expand(images, -1, -1)
    return found


def _rows(
    selection: Selection, items: Sequence[PlanItem], columns: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Read a record once, and repeat its rows for each of its images."""
    positions, first, of_item = np.unique(
        [item.position for item in items], return_index=True, return_inverse=True
    )
    try:
        part = selection.take(positions)
        rows = {name: part.read(name) for name in columns}
    except NotFoundError as error:  # a compaction has moved the records meanwhile
        part = _found_again(selection, [items[i] for i in first], str(error))
        rows = {name: part.read(name) for name in columns}
    return {name: values[of_item] for name, values in rows.items()}


def _found_again(selection: Selection, items: Sequence[PlanItem], reason: str) -> Selection:
    """Find records in the store as it is now, if they are still what was planned.

    Raises
    ------
    DamagedDataError
        If one was deleted or replaced.
    """
    known: dict[str, Any] = {n: {getattr(item.key, n) for item in items} for n in KEY_COLUMNS}
    fresh = EmbeddingStore.open(selection.path).select(**known)
    positions = {key: position for position, key in enumerate(fresh.keys())}
    gone = [str(item.key) for item in items if item.key not in positions]
    if gone:
        raise DamagedDataError(f"{reason}; {gone[0]} has been deleted since")
    part = fresh.take([positions[item.key] for item in items])
    for item, found in zip(items, record_digests(part, items[0].digests), strict=True):
        if found != item.digests:
            raise DamagedDataError(f"{reason}; {item.key} has been replaced since")
    return part


def _pooled(sequence: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool ``[images, tokens, features]`` to ``[images, features]``."""
    if pool == "mean":
        return sequence.mean(dim=1)
    # The last token of a causal text encoder is the one that has seen all the others.
    return sequence[:, -1 if pool == "last" else 0]
