"""The formats, by the name that the tables show; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from .base import Format

_CLASSES = {
    "store": ("ours", "Exact"),
    "store bfloat16": ("ours", "Rounded"),
    "store raw": ("ours", "Raw"),
    "torch.load": ("torch_files", "Loaded"),
    "torch.load mmap": ("torch_files", "Mapped"),
    "safetensors": ("safetensors_files", "Safetensors"),
    "HDF5": ("hdf5", "Hdf5"),
    "Lance": ("lance_table", "Lance"),
    "TensorStore": ("tensorstore_zarr", "TensorStore"),
    "zarr-python": ("zarr_python", "ZarrPython"),
}
NAMES = tuple(_CLASSES)


def load(name: str) -> Format:
    """Return the format called `name`."""
    module, cls = _CLASSES[name]
    found: Format = getattr(import_module(f"{__name__}.{module}"), cls)()
    found.name = name
    return found
