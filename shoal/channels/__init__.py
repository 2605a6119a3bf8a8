"""Networks with fewer channels: slimmable, cut, or pruned by magnitude."""

from shoal.moved import forward

__getattr__ = forward(__name__)
