"""Pixels in: everything that opens images, and the only (x, y) -> (y, x) turn of the project."""

from workers.readers.opening import open_image

__all__ = ["open_image"]
