"""Giving space back: thin shards and small files of keys are gathered, and what is dead removed.

What may be removed, and when: a shard without a live record that a commit referred to, at once, as
readers of an older commit are told; what no commit ever referred to, or what a compaction has put
another file in place of, after `LIFETIME`. A writer that takes longer than half of that gives up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedgfe_store.records import RecordBatch
from fedgfe_store.storage.engine import Compaction
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.shared import transaction as writing
from fedgfe_store.storage.shared.facts import BOUNDED, KeyFile
from fedgfe_store.storage.shared.key_table import TABLE, arrow_table, record_columns, table_name
from fedgfe_store.storage.shared.snapshot import SharedSnapshot
from fedgfe_store.storage.shared.transaction import Prepared, SharedTransaction
from fedgfe_store.storage.shared.verify import unreferred
from fedgfe_store.storage.writing import Change, OvertakenError

# A copy then gains at least as many bytes as it writes.
_THIN = 0.5
"""Share of live records up to which a shard is worth copying."""
_FILE_ROWS = 131_072
"""Rows of a gathered file of keys, 5 to 10 MB: what a query reads at least."""
_NOTHING = np.empty(0, np.int64)


def compact(transaction: SharedTransaction) -> tuple[Compaction, SharedSnapshot]:
    """Gather thin shards and small files of keys, in one commit, and remove what is dead."""
    before = tensor_bytes(transaction.snapshot)
    moved = _move_thin(transaction)
    while True:
        snapshot = transaction.snapshot
        rows = moved[np.isin(moved, snapshot.rows_matching({}))]
        # Where others have deleted some of them meanwhile, their copies are nobody's.
        dropped = np.flatnonzero(~np.isin(moved, rows))
        small = _small(snapshot)
        # What writers that died left behind is removed all the same.
        due = _died_since(snapshot) and _dead_shards(snapshot, unreferred(snapshot))
        if not (len(rows) or small or due):
            break
        added = [*_gathered(transaction, snapshot, small)]
        try:
            snapshot = transaction.commit_files(Change("compact", rows, dropped), added, small)
            break
        except OvertakenError:
            continue
    freed = _remove(snapshot)
    return Compaction(len(rows), freed, before, tensor_bytes(snapshot)), snapshot


def tensor_bytes(snapshot: SharedSnapshot) -> int:
    """Return the bytes that the store's shards take."""
    return sum(
        size
        for name in snapshot.schema.columns
        for file, size in (snapshot.place.sizes(name) or {}).items()
        if granule_of(file) >= 0
    )


def _move_thin(transaction: SharedTransaction) -> np.ndarray:
    """Copy the live records of thinly filled shards into new ones; return their rows."""
    snapshot = transaction.snapshot
    granule, live = snapshot.schema.granule, snapshot.rows_matching({})
    numbers, counts = np.unique(live // granule, return_counts=True)
    thin = numbers[counts <= granule * _THIN]
    rows = live[np.isin(live // granule, thin)]
    if len(thin) <= -(-len(rows) // granule):
        return _NOTHING
    names = [n for n in record_columns(snapshot.schema) if n not in ("created_in", "deleted_in")]
    for start in range(0, len(rows), granule):
        part = rows[start : start + granule]
        snapshot.notes(part)
        columns = {name: snapshot.column_at(name, part) for name in names}
        tensors = {name: snapshot.read(name, part) for name in snapshot.schema.columns}
        transaction.write(RecordBatch(columns, tensors))
    return rows


def _small(snapshot: SharedSnapshot) -> list[KeyFile]:
    """Return the files of keys that are gathered: all but large ones; none if they are few."""
    found = [f for f in snapshot.files if f.part != "records" or f.n < _FILE_ROWS // 2]
    records = [f for f in found if f.part == "records"]
    marks = [f for f in found if f.part == "marks"]
    commits = {file.commit for file in found if file.part != "commits"}
    worth = len(records) > 1 or len(marks) > 1 or (records and marks)
    return found if worth and len(commits) > 1 else []


def _gathered(
    transaction: SharedTransaction, snapshot: SharedSnapshot, small: Sequence[KeyFile]
) -> Iterator[Prepared]:
    """Write files in place of the `small` ones, whose records they hold by round and node."""
    if not small:
        return
    records = sorted((f for f in small if f.part == "records"), key=lambda f: f.bounds["round"])
    marks = [snapshot.columns(file) for file in snapshot.files if file.part == "marks"]
    rows = np.concatenate([_NOTHING, *(columns.row for columns in marks)])
    commits = np.concatenate([np.empty(0, np.int32), *(columns.marked for columns in marks)])
    order = np.argsort(rows)
    rows, commits = rows[order], commits[order]
    used = np.zeros(len(rows), bool)
    group: list[pa.Table] = []
    for file in records:
        group.append(_settled(snapshot, file, rows, commits, used))
        if sum(map(len, group)) >= _FILE_ROWS:
            yield _put(transaction, group)
            group = []
    if group:
        yield _put(transaction, group)
    if not used.all():
        yield _marks(transaction, snapshot, rows[~used], commits[~used])
    told = snapshot.facts
    table = arrow_table(
        snapshot.schema,
        {
            "row": np.zeros(len(told), np.int64),
            "created_in": np.array([*told], np.int32),
            "facts": np.array([f.encode() for f in told.values()], np.dtypes.StringDType()),
        },
    )
    yield transaction.put(table, "commits", {})


def _settled(
    snapshot: SharedSnapshot,
    file: KeyFile,
    rows: np.ndarray,
    commits: np.ndarray,
    used: np.ndarray,
) -> pa.Table:
    """Return the records of a file with the commits that made and deleted them."""
    # Not kept: all of them together would take as much memory as the store has keys.
    columns = snapshot.read_columns(file)
    deleted = columns.deleted.astype(np.int32)
    if len(rows):
        at = np.searchsorted(rows, columns.row).clip(max=len(rows) - 1)
        hit = rows[at] == columns.row
        deleted[hit] = commits[at[hit]]
        used[at[hit]] = True
    table = columns.arrow()
    given = {
        "created_in": pa.array(columns.created.astype(np.int32)),
        "recorded_in": pa.array(columns.recorded.astype(np.int32)),
        "deleted_in": pa.array(deleted, mask=deleted == 0),
    }
    for name, values in given.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


def _put(transaction: SharedTransaction, tables: Sequence[pa.Table]) -> Prepared:
    table = pa.concat_tables(tables)
    order = [(table_name(n), "ascending") for n in ("round", "node", "split", "class_name")]
    table = table.take(pc.sort_indices(table, sort_keys=[*order, ("row", "ascending")]))
    return transaction.put(table.combine_chunks(), "records", _bounded(table))


def _bounded(table: pa.Table) -> dict[str, np.ndarray]:
    found = {}
    for name in BOUNDED:
        column = table.column(name)
        if pa.types.is_string(column.type):
            distinct = pc.unique(column).to_pylist()
            found[name] = np.array(distinct, np.dtypes.StringDType())
        else:
            found[name] = column.to_numpy()
    return found


def _marks(
    transaction: SharedTransaction, snapshot: SharedSnapshot, rows: np.ndarray, commits: np.ndarray
) -> Prepared:
    columns = {n: snapshot.column_at(n, rows) for n in BOUNDED if n != "row"} | {"row": rows}
    table = arrow_table(snapshot.schema, {**columns, "deleted_in": commits})
    return transaction.put(table, "marks", columns)


def _dead_shards(snapshot: SharedSnapshot, names: Sequence[str]) -> list[str]:
    """Return those of the unreferred files `names` that are shards of commits."""
    runs = [run for facts in snapshot.facts.values() for run in facts.granules]
    committed = {number for first, n in runs for number in range(first, first + n)}
    return [name for name in names if granule_of(name.rpartition("/")[2]) in committed]


def _died_since(snapshot: SharedSnapshot) -> bool:
    """Whether records were deleted since the last compaction, of which readers must be told."""
    compacted = snapshot.point.compacted
    return any(facts.deleted for n, facts in snapshot.facts.items() if n > compacted)


def _remove(snapshot: SharedSnapshot) -> int:
    """Remove what nobody needs any more; return how many shards."""
    names = unreferred(snapshot)
    dead = set(_dead_shards(snapshot, names))
    hours = writing.LIFETIME / 3600
    expired = {f"{TABLE}/{name}" for name in snapshot.session.log.expired(hours)}
    old: set[str] = set()
    for folder in (TABLE, *snapshot.schema.columns):
        ages = snapshot.place.ages(folder)
        old |= {f"{folder}/{name}" for name, age in ages.items() if age >= writing.LIFETIME}
    freed = 0
    for name in names:
        is_key_file = name.startswith(f"{TABLE}/")
        if name in dead or (name in old and (not is_key_file or name in expired)):
            snapshot.place.remove(name)
            freed += not is_key_file
    return freed
