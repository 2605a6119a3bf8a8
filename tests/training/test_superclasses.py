"""The superclasses of CIFAR-100 that a benchmark trains on."""

from __future__ import annotations

import torch

from benchmarks.training.superclasses import SUPERCLASSES, with_superclasses
from shoal.data.class_names import CLASS_NAMES
from shoal.data.dataset import Dataset, Split


def test_every_class_is_in_one_superclass_of_five() -> None:
    names = [names.split() for names in SUPERCLASSES.values()]
    assert [len(row) for row in names] == [5] * 20
    assert sorted(name for row in names for name in row) == sorted(CLASS_NAMES["cifar100"])


def test_labels_become_those_of_superclasses() -> None:
    fine = CLASS_NAMES["cifar100"]
    split = Split(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100))
    data = Dataset("cifar100", split, split, split, 100, (0.0,), (1.0,), "none", fine)
    found = with_superclasses(data)
    assert found.classes == 20
    assert torch.bincount(found.test.labels).tolist() == [5] * 20
    assert found.class_names[int(found.train.labels[fine.index("whale")])] == "aquatic mammals"
