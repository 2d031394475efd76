"""Recording embeddings while training runs, straight into a store.

`Recorder` goes into any training loop; `fedgfe_store.recording.fedgfe` is for FedGFE's.
"""

from fedgfe_store.recording.preview import Preview
from fedgfe_store.recording.recorder import Recorder

__all__ = ["Preview", "Recorder"]
