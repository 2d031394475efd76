"""Rows of a store as something else, a module for each framework: torch, xarray, HTML."""
