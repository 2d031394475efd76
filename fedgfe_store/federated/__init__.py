"""Recording embeddings while federated training runs, straight into a store.

`Recorder` goes into any training loop. `EmbeddingClientMixin` and `EmbeddingServerMixin` give
FedGFE's clients and server the methods that saved ``.pt`` checkpoints, so that hooks and
configurations stay as they are.
"""

from fedgfe_store.federated.batches import EmbeddingBatch
from fedgfe_store.federated.mixins import (
    EmbeddingClientMixin,
    EmbeddingServerMixin,
)
from fedgfe_store.federated.recorder import Recorder
from fedgfe_store.federated.settings import RecordingSettings

__all__ = [
    "EmbeddingBatch",
    "EmbeddingClientMixin",
    "EmbeddingServerMixin",
    "Recorder",
    "RecordingSettings",
]
