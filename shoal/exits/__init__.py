"""Networks with several classifiers: where they are, what each costs, and images that leave early."""

from shoal.moved import forward

__getattr__ = forward(__name__)
