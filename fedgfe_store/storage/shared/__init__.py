"""Stores that many write to at once: shards as in any store, keys and commits in a Delta table."""
