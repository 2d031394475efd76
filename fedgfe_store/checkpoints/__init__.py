"""Legacy FedGFE ``.pt`` checkpoints: what is in them, and bringing them into a store.

A file goes through ``_pickles`` (safe loading), ``_header`` (node, round, time), ``_entries``
(which tensor is which, which record it belongs to), ``reading`` (one sample at a time) and
``importing`` (one commit per file). ``exporting`` goes the other way.
"""

from fedgfe_store.checkpoints._entries import Skipped
from fedgfe_store.checkpoints.exporting import ExportedFile, export_checkpoints
from fedgfe_store.checkpoints.importing import (
    FileReport,
    ImportReport,
    find_checkpoints,
    import_checkpoints,
)
from fedgfe_store.checkpoints.reading import (
    Checkpoint,
    Entry,
    experiment_name,
    read_checkpoint,
    schema_of,
)

__all__ = [
    "Checkpoint",
    "Entry",
    "ExportedFile",
    "FileReport",
    "ImportReport",
    "Skipped",
    "experiment_name",
    "export_checkpoints",
    "find_checkpoints",
    "import_checkpoints",
    "read_checkpoint",
    "schema_of",
]
