"""Tracing a module and changing it: normal form, ReLU sites, replacement of layers, conversion to a `Graph`."""

from shoal.moved import forward

__getattr__ = forward(__name__)
