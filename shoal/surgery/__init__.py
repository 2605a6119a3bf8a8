"""Changing a traced network: tracing, normal form, ReLU sites, substitution."""

from shoal.moved import forward

__getattr__ = forward(__name__)
