"""The zoo's networks that tests of all of them take: of each family those that are not its deepest."""

from shoal.models import NAMES

_WIDE = ("wrn-28", "wrn-40", "wrn50", "wrn101")
_DEEP = (*_WIDE, "resnet44", "resnet56", "resnet101", "resnet110", "resnet152", "resnext101", "senet101")

QUICK = tuple(name for name in NAMES if not name.startswith(_DEEP))
ONE_CLASSIFIER = tuple(name for name in QUICK if not name.startswith("msdnet"))
