"""The old name of `fedgfe_store.recording`, for training code and pickles; until 0.3."""

import sys
import warnings

from fedgfe_store.recording import Recorder, block, pages, recorder, target
from fedgfe_store.recording.fedgfe import (
    EmbeddingBatch,
    EmbeddingClientMixin,
    EmbeddingServerMixin,
    RecordingSettings,
    entries,
    mixins,
    settings,
)

__all__ = [
    "EmbeddingBatch",
    "EmbeddingClientMixin",
    "EmbeddingServerMixin",
    "Recorder",
    "RecordingSettings",
]

# The import system and pickle look for a submodule here before they ask where it lies. Names with
# an underscore are in pickles of hosts of the mixins: `_runs.Run`, above all.
for _old, _now in {
    "batches": entries,
    "mixins": mixins,
    "recorder": recorder,
    "settings": settings,
    "_jobs": pages,
    "_pages": pages,
    "_round": block,
    "_runs": target,
    "_target": target,
}.items():
    sys.modules[f"{__name__}.{_old}"] = globals()[_old] = _now

warnings.warn(
    "fedgfe_store.federated will go with 0.3: Recorder is in fedgfe_store.recording now, and the"
    " mixins, EmbeddingBatch and RecordingSettings are in fedgfe_store.recording.fedgfe",
    DeprecationWarning,
    stacklevel=2,
)
