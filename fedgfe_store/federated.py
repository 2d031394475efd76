"""The old name of `fedgfe_store.recording`, for training code that imports it; until 0.3."""

from fedgfe_store.recording import Recorder
from fedgfe_store.recording.fedgfe import (
    EmbeddingBatch,
    EmbeddingClientMixin,
    EmbeddingServerMixin,
    RecordingSettings,
)

__all__ = [
    "EmbeddingBatch",
    "EmbeddingClientMixin",
    "EmbeddingServerMixin",
    "Recorder",
    "RecordingSettings",
]
