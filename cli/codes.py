"""Exit codes, and when a launcher would misunderstand one."""

from __future__ import annotations

import os

SOME_FAILED = 3
"""Some records or files failed, the others are done."""
STOPPED = 75
"""A signal ended the run; the same command goes on."""


def ends_other_processes() -> bool:
    """Whether a launcher takes any exit code but 0 for a reason to stop all its processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"
