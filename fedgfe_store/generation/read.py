"""Reading the embeddings of a run's images batch by batch, each image claimed before it is read."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from fedgfe_store.derived.again import derive
from fedgfe_store.derived.record import Derived
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import DamagedDataError, FedgfeStoreError, NotFoundError
from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.plan import PlanItem, look_again
from fedgfe_store.generation.prepare import Run
from fedgfe_store.images.identity import record_digests
from fedgfe_store.readers.torch import BatchReader, prefetch
from fedgfe_store.records import KEY_COLUMNS, RecordKey
from fedgfe_store.rows import Rows
from fedgfe_store.selection import Selection
from fedgfe_store.store import EmbeddingStore

# One is ready when the device asks, one is being read: an image is claimed as it is read, so more
# would only keep it from other processes.
_READ_AHEAD = 2


@dataclass(frozen=True)
class Embedded:
    """Images with their embeddings, one row each, and what became of others on the way.

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


def read_embeddings(run: Run, claims: Claims) -> Generator[Embedded]:
    """Read what a run has to do, in a thread that is ahead, as `Selection.batches` does.

    Parameters
    ----------
    run : Run
        The run.
    claims : Claims
        Claims of its folder; an image is claimed just before it is read, and stays so.

    Yields
    ------
    Embedded
        As many images as a batch has, but for the last and where records are damaged. Closing
        the iterator ends the thread.
    """
    return prefetch(map(partial(_embedded, run), _claimed(run, claims)), _READ_AHEAD)


@dataclass
class _Claimed:
    """Images that were claimed, those that others made or make, and those that are refused."""

    taken: list[PlanItem] = field(default_factory=list)
    elsewhere: list[PlanItem] = field(default_factory=list)
    refused: dict[PlanItem, str] = field(default_factory=dict)


def _claimed(run: Run, claims: Claims) -> Iterator[_Claimed]:
    """Take images in the plan's order; try those that others hold once more at the end."""
    held: list[PlanItem] = []
    claimed = _Claimed()
    for last_try, items in ((False, run.plan.todo), (True, held)):
        for item in items:
            # Waiting for one would keep all behind it waiting, which may be free: at the end only.
            if not claims.take(item.path.name, wait=last_try):
                (claimed.elsewhere if last_try else held).append(item)
                continue
            # Only now: whoever held the claim before may have finished the image since.
            found = look_again(item, run.plan)
            refused = found is not None and run.plan.refuses(found)
            kept = refused and run.request.on_stale == "keep"
            if found is not None and (kept or found.item.status == "done"):
                claims.release(item.path.name)
                claimed.elsewhere.append(item)
            elif found is not None and refused:
                claimed.refused[item] = f"{found.verdict.conflict}: made meanwhile by another run"
            else:
                claimed.taken.append(item)
            if len(claimed.taken) == run.batch_size:
                yield claimed
                claimed = _Claimed()
    if claimed.taken or claimed.elsewhere or claimed.refused:
        yield claimed


def _embedded(run: Run, claimed: _Claimed) -> Embedded:
    items, damaged = claimed.taken, dict(claimed.refused)
    try:
        tensors = _checked(run, items)
    except DamagedDataError:
        # One bad record must not take its neighbours along: find it by reading each alone.
        rows = []
        for item in claimed.taken:
            try:
                rows.append(_checked(run, [item]))
            except DamagedDataError as error:
                damaged[item] = str(error)
        items = [item for item in claimed.taken if item not in damaged]
        tensors = {name: torch.cat([row[name] for row in rows]) for name in next(iter(rows), {})}
    embeddings = _conditioning(run, tensors, len(items)) if tensors else {}
    return Embedded(tuple(items), embeddings, damaged, tuple(claimed.elsewhere))


def _conditioning(
    run: Run, tensors: Mapping[str, torch.Tensor], images: int
) -> dict[str, torch.Tensor]:
    """Give what was read by the arguments of the model's pipeline."""
    found = {argument: tensors[name] for argument, name in run.columns.items()}
    pool, lengths = run.plan.settings.pool, _lengths(run)
    for column in run.model.family.columns:
        if pool is not None and column.kind == "vector" and found[column.argument].ndim == 3:
            found[column.argument] = _pooled(found[column.argument], pool)
        if lengths is not None and column.is_mask and column.argument not in found:
            places = torch.arange(found[run.model.family.sequence.argument].shape[1])
            found[column.argument] = places < tensors[lengths][:, None]
    if run.negative is not None:
        for argument, value in run.negative.values.items():
            found[f"negative_{argument}"] = torch.from_numpy(value).expand(images, *value.shape)
    return found


def _lengths(run: Run) -> str | None:
    """Name the column that masks are made from: a ragged sequence's, where there are no masks."""
    family, name = run.model.family, f"length_{run.columns[run.model.family.sequence.argument]}"
    lacking = any(c.is_mask and c.argument not in run.columns for c in family.columns)
    return name if lacking and name in run.selection.schema.marks else None


@dataclass(frozen=True)
class _Wanted:
    """A record to read: its position among others, its key, and its digests as planned."""

    position: int
    key: Key
    digests: dict[str, str]


def _checked(run: Run, items: Sequence[PlanItem]) -> dict[str, torch.Tensor]:
    """Read, and refuse masks that the pipeline would misread without a word.

    Raises
    ------
    DamagedDataError
        If a record cannot be read, or its mask is none for this model.
    """
    tensors = _tensors(run, items)
    for column in run.model.family.columns:
        name = run.columns.get(column.argument)
        if items and column.is_mask and name and not column.takes(tensors[name].numpy()):
            raise DamagedDataError(
                f"expected a {name} of ones and then zeros, whose number {run.model.kind} takes "
                "as a length, got another"
            )
    return tensors


def _tensors(run: Run, items: Sequence[PlanItem]) -> dict[str, torch.Tensor]:
    """Read each column from the images' own records, or from those that it is to be from."""
    if not items:
        return {}
    # One column may be several arguments of the pipeline; it is read once.
    columns = dict.fromkeys(run.columns.values())
    own = [name for name in columns if name not in run.partners]
    found: dict[str, torch.Tensor] = {}
    if own:
        wanted = [_Wanted(i.position, i.key, {n: i.digests[n] for n in own}) for i in items]
        found = _read(run.selection, wanted, _with_lengths(run, own))
    for name, partners in run.partners.items():
        places = [partners.place(item.key) or 0 for item in items]  # the plan has refused None
        wanted = [
            _Wanted(place, partners.keys[place], {name: item.digests[name]})
            for place, item in zip(places, items, strict=True)
        ]
        found |= _read(partners.selection, wanted, _with_lengths(run, [name]))
    return found


def _with_lengths(run: Run, names: list[str]) -> list[str]:
    lengths = _lengths(run)
    return names if lengths is None or lengths[len("length_") :] not in names else [*names, lengths]


def _read(
    selection: Rows | Derived, wanted: Sequence[_Wanted], columns: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Read a record once, and repeat its rows for each of its images."""
    reader = BatchReader(columns)
    # In the order of the records: neighbours lie in one file, which is then read once.
    positions, first, of_item = np.unique(
        [record.position for record in wanted], return_index=True, return_inverse=True
    )
    try:
        tensors = dict(reader.read(selection.take(positions)).tensors)
    except NotFoundError as error:  # a compaction has moved the records meanwhile
        parts = _found_again(selection, [wanted[i] for i in first], str(error))
        again = [reader.read(part).tensors for part in parts]
        tensors = {name: torch.cat([each[name] for each in again]) for name in columns}
    if np.array_equal(of_item, np.arange(len(positions))):  # an image each: spare a second copy
        return tensors
    # By numpy: torch would start threads for it beside those that denoise.
    return {name: torch.from_numpy(t.numpy()[of_item]) for name, t in tensors.items()}


def _found_again(
    selection: Rows | Derived, wanted: Sequence[_Wanted], reason: str
) -> Sequence[Rows | Derived]:
    """Find records in the store as it is now, if they are still what was planned.

    Raises
    ------
    DamagedDataError
        If one was deleted or replaced.
    """
    store = EmbeddingStore.open(selection.location)
    # Positions count in the commit that was planned from; keys are what other commits share.
    parts: list[Rows | Derived] = [*_records_again(store, wanted, reason)]
    parts += _derived_again(store, wanted, reason)
    found = [digests for part in parts for digests in record_digests(part, wanted[0].digests)]
    for each, digests in zip(wanted, found, strict=True):
        if digests != each.digests:
            raise DamagedDataError(f"{reason}; {each.key} has been replaced since")
    return parts


def _records_again(
    store: EmbeddingStore, wanted: Sequence[_Wanted], reason: str
) -> Iterator[Selection]:
    keys = [each.key for each in wanted if isinstance(each.key, RecordKey)]
    if not keys:
        return
    known: dict[str, Any] = {n: {key.value(n) for key in keys} for n in KEY_COLUMNS}
    fresh = store.select(**known)
    positions = {key: position for position, key in enumerate(fresh.keys())}
    gone = [str(key) for key in keys if key not in positions]
    if gone:
        raise DamagedDataError(f"{reason}; {gone[0]} has been deleted since")
    yield fresh.take([positions[key] for key in keys])


def _derived_again(
    store: EmbeddingStore, wanted: Sequence[_Wanted], reason: str
) -> Iterator[Derived]:
    for each in wanted:
        if isinstance(each.key, RecordKey):
            continue
        try:
            yield derive(store.select(), each.key)
        except FedgfeStoreError as error:
            raise DamagedDataError(f"{reason}; {error}") from None


def _pooled(sequence: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool ``[images, tokens, features]`` to ``[images, features]``."""
    if pool == "mean":
        return sequence.mean(dim=1)
    # The last token of a causal text encoder is the one that has seen all the others.
    return sequence[:, -1 if pool == "last" else 0]
