"""A folder of generated images as one static page: filters, provenance, rounds side by side."""

from fedgfe_store.images.gallery.making import Gallery, make_gallery, scan_images

__all__ = ["Gallery", "make_gallery", "scan_images"]
