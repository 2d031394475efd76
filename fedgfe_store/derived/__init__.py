"""Derived records: means of groups and walks between records, computed as they are read."""
