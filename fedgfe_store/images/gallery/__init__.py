"""Folders of generated images as one static page: filters, provenance, two of anything compared."""

from fedgfe_store.images.gallery.making import Gallery, make_gallery, scan_images
from fedgfe_store.images.gallery.points import Points

__all__ = ["Gallery", "Points", "make_gallery", "scan_images"]
