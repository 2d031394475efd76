"""What images are told apart by besides their records."""

SETTINGS = ("model", "steps", "guidance", "seed", "folder")
"""Settings, and the folder, by which images of several folders differ."""
