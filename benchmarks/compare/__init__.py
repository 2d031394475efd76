"""The store beside the formats that a user would pick instead; run with ``make bench``."""
