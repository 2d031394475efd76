"""Legacy FedGFE ``.pt`` checkpoints: what is in them, and bringing them into a store.

A file goes through ``torch_files`` (safe loading, by ``torch_formats``, ``zip_members``,
``unpickler`` and ``builders``), ``header`` (node, round, time), ``entries`` (which tensor is which,
which record it belongs to), ``reading`` (one sample at a time, by ``samples``) and ``importing``
(one commit per file, as ``request`` asks; ``ahead`` opens the next one); ``earlier`` is what the
store had before, and ``text_cache`` reads caches of text embeddings as if they were
checkpoints. ``ledger`` remembers what a store has taken in, and ``sources`` takes files as names
for records. ``exporting`` goes the other way.
"""

from fedgfe_store.checkpoints.entries import Skipped
from fedgfe_store.checkpoints.experiments import experiment_name, schema_of
from fedgfe_store.checkpoints.exporting import export_checkpoints
from fedgfe_store.checkpoints.importing import import_checkpoints
from fedgfe_store.checkpoints.listing import find_checkpoints
from fedgfe_store.checkpoints.reading import Checkpoint, read_checkpoint
from fedgfe_store.checkpoints.report import FileReport, ImportReport
from fedgfe_store.checkpoints.request import ImportRequest
from fedgfe_store.checkpoints.samples import Entry
from fedgfe_store.checkpoints.sources import Sources, find_new, select_records
from fedgfe_store.checkpoints.text_cache import read_text_cache
from fedgfe_store.readers.exporting import ExportedFile

__all__ = [
    "Checkpoint",
    "Entry",
    "ExportedFile",
    "FileReport",
    "ImportReport",
    "ImportRequest",
    "Skipped",
    "Sources",
    "experiment_name",
    "export_checkpoints",
    "find_checkpoints",
    "find_new",
    "import_checkpoints",
    "read_checkpoint",
    "read_text_cache",
    "schema_of",
    "select_records",
]
