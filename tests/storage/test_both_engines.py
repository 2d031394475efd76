"""What holds of local stores holds of shared ones: one of each kind of test; the rest is long."""

from __future__ import annotations

import test_changes
import test_store
from both_engines import borrowed, every_store_is_shared, store

globals().update(borrowed([test_store, test_changes], quick=True))

__all__ = ["every_store_is_shared", "store"]
