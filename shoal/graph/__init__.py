"""`Graph`, a network once it is trained: operations, counting, folding."""

from shoal.moved import forward

__getattr__ = forward(__name__)
