"""The tests of imports, on shared stores."""

from __future__ import annotations

import both_engines  # first: it says where the modules are
import pytest
import test_import_answers

pytestmark = pytest.mark.long
every_store_is_shared = both_engines.every_store_is_shared
globals().update(both_engines.borrowed([test_import_answers], quick=False))
