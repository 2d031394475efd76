"""What images are told apart by besides their records."""

SETTINGS = ("model", "steps", "guidance", "seed", "folder")
"""Settings, and the folder, by which images of several folders differ."""

OF_DERIVED = ("derived", "frame")
"""Of derived records: which mean or walk an image is of, and which frame of it."""
