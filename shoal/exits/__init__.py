"""Early exits: classifiers at intermediate depths, their cost, and inference in which images leave early."""

from shoal.moved import forward

__getattr__ = forward(__name__)
