"""igzip, which compresses and checks several times as fast as zlib, where it is built."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

# There is none for a processor that it is not built for.
isal_zlib: Any = import_module("isal.isal_zlib") if find_spec("isal") else None
"""What `zlib` has, by igzip; None where there is none."""
