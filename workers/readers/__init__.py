"""Pixels in: everything that opens images, and the only (x, y) -> (y, x) turn of the project."""

from workers.readers.listing import expand
from workers.readers.opening import identity_of, open_image

__all__ = ["expand", "identity_of", "open_image"]
