"""What is asked of an import: one value for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from fedgfe_store.checkpoints.header import RoundFrom
from fedgfe_store.schema import Precision
from fedgfe_store.storage.engine import LOCK_TIMEOUT
from fedgfe_store.storage.sifting import IfExists


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What is asked of an import.

    Parameters
    ----------
    pattern : str
        Which files of a folder.
    audio : bool
        Keep audio embeddings too.
    precision : {"float32", "bfloat16"}
        How a store that is made here keeps values. float64 values are rounded to float32.
    if_exists : {"error", "replace", "skip"}
        What becomes of records whose key the store has with other tensors. With ``"replace"`` a
        file stands for all of its node, round and splits: other records of those, as an earlier
        run left them, are deleted in the same commit.
    dry_run : bool
        Read and report, write nothing.
    new_only : bool
        Do not read files that the store has taken in as they are, see `Ledger`, and do not put
        back records that were deleted from it.
    round_from : {"name", "content"}, optional
        Which round counts where a file's name and its content tell different ones; by default
        such a file is refused.
    fail_fast : bool
        Stop at the first file that fails, and let a file fail of which a sample cannot be taken.
    other_experiment : bool
        Take files of another experiment than the store's, too. A file is of the experiment that
        the folder of its images names, or its own folder.
    timeout : float
        Seconds that each file waits for another writer.
    """

    pattern: str = "*.pt"
    audio: bool = False
    precision: Precision = "float32"
    if_exists: IfExists = "error"
    dry_run: bool = False
    new_only: bool = False
    round_from: RoundFrom | None = None
    fail_fast: bool = False
    other_experiment: bool = False
    timeout: float = LOCK_TIMEOUT


DEFAULTS = ImportRequest()
"""What is asked where nothing is said."""


class ImportOptions(TypedDict, total=False):
    """The fields of `ImportRequest`, which a test compares, as type checkers see keywords of it."""

    pattern: str
    audio: bool
    precision: Precision
    if_exists: IfExists
    dry_run: bool
    new_only: bool
    round_from: RoundFrom | None
    fail_fast: bool
    other_experiment: bool
    timeout: float
