"""Data sets: readers of the published layouts, splits, augmentation."""

from shoal.moved import forward

__getattr__ = forward(__name__)
