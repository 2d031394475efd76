"""A condition in SQL about what is known of records, answered by DuckDB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.errors import SchemaMismatchError

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.rows import Rows

# A condition may come from anywhere, such as a page's form: it reaches neither a file, nor the
# network, nor the variables of this process.
_SHUT = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}
# Besides the error what it takes to be meant; of functions it would list every one.
_MOST_LINES = 2
_POSITION = "position_among_records"


def positions(selection: Rows, condition: str) -> np.ndarray:
    """Return which records meet a condition, int64 positions in order; see `Selection.where`."""
    duckdb = extra("duckdb", "where", "sql")
    if not isinstance(condition, str) or not condition.strip():
        raise SchemaMismatchError(f"where: expected a condition in SQL, got {condition!r}")
    frame = _plain(selection.records)
    with duckdb.connect(":memory:", config=_SHUT) as connection:
        connection.register("records", frame.assign(**{_POSITION: np.arange(len(frame))}))
        try:
            # One expression: DuckDB refuses further statements and clauses in its place.
            met = connection.view("records").filter(condition)
            found = met.project(_POSITION).fetchnumpy()[_POSITION]
        except duckdb.Error as error:
            # Such as of node = 0: DuckDB then takes all the others for numbers, too.
            is_type = isinstance(error, duckdb.ConversionException)
            hint = "; texts stand in quotes: node = '0'" if is_type else ""
            raise SchemaMismatchError(f"where {condition!r}: {_said(error)}{hint}") from None
    return np.sort(np.asarray(found, np.int64))


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with times without a zone, and NULL where there is no `extra`: no JSON."""
    return frame.assign(
        timestamp=frame["timestamp"].dt.tz_localize(None),
        extra=frame["extra"].astype(object).where(frame["extra"] != "", None),
    )


def _said(error: Exception) -> str:
    """Return what DuckDB says in one line, without the condition that it repeats."""
    lines = str(error).partition("\nLINE ")[0].splitlines()
    told = [line.strip() for line in lines if line.strip()]
    return "; ".join(told[:_MOST_LINES])
