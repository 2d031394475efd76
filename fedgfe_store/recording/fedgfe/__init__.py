"""Recording in FedGFE: what its clients and server call, as hooks and configurations stand today.

`EmbeddingClientMixin` and `EmbeddingServerMixin` have the methods that saved ``.pt`` checkpoints.
"""

from fedgfe_store.recording.fedgfe.entries import EmbeddingBatch
from fedgfe_store.recording.fedgfe.mixins import EmbeddingClientMixin, EmbeddingServerMixin
from fedgfe_store.recording.fedgfe.settings import RecordingSettings

__all__ = [
    "EmbeddingBatch",
    "EmbeddingClientMixin",
    "EmbeddingServerMixin",
    "RecordingSettings",
]
