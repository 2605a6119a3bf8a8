"""The zoo's networks that tests of all of them take: of each family those that are not its deepest."""

from shoal.models import NAMES

_WIDE = ("wrn-28", "wrn-40", "wrn50", "wrn101")
_DEEP = (*_WIDE, "resnet44", "resnet56", "resnet101", "resnet110", "resnet152", "resnext101", "senet101")
_LARGE = tuple(name for name in NAMES if name.endswith("-imagenet") and name != "resnet18-imagenet")

QUICK = tuple(name for name in NAMES if not name.startswith(_DEEP) and name not in _LARGE)
ONE_OF_A_FAMILY = ("resnet10", "resnet20", "wrn-16-4", "vgg16-avg", "mobilenetv1", "osakd-cnn1")
"""Those that `make check` runs where all others would take long."""
ONE_CLASSIFIER = tuple(name for name in QUICK if not name.startswith("msdnet"))
