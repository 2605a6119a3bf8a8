"""`Graph`, the form of a trained network: its operations, counting, and folding."""

from shoal.moved import forward

__getattr__ = forward(__name__)
