"""The tests of stores, on shared stores."""

from __future__ import annotations

import both_engines  # first: it says where the modules are
import pytest
import test_changes
import test_selection
import test_store

pytestmark = pytest.mark.long
every_store_is_shared, store = both_engines.every_store_is_shared, both_engines.store
globals().update(both_engines.borrowed([test_changes, test_selection, test_store], quick=False))
