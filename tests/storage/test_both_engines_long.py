"""The tests of local stores, imports and recordings, on shared stores."""

from __future__ import annotations

import both_engines  # first: it says where the modules are
import pytest
import test_any_columns
import test_changes
import test_federated
import test_import_answers
import test_import_replaces
import test_ledger
import test_recorded_columns
import test_runs
import test_selection
import test_store

store, every_store_is_shared = both_engines.store, both_engines.every_store_is_shared
pytestmark = pytest.mark.long

SUITES = [test_any_columns, test_import_answers, test_import_replaces, test_ledger, test_runs]
SUITES += [test_federated, test_recorded_columns, test_selection, test_changes, test_store]
globals().update(both_engines.borrowed(SUITES, quick=False))
