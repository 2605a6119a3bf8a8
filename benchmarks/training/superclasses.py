"""The 20 superclasses of CIFAR-100, as its web page lists them: a task for small networks and few images."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.data.dataset import Dataset, Split

SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
"""Superclass -> its five classes. Source: www.cs.toronto.edu/~kriz/cifar.html."""


def with_superclasses(data: Dataset) -> Dataset:
    """CIFAR-100 with its superclasses as labels 0 to 19; images and splits stay as they are."""
    of_class = {name: i for i, names in enumerate(SUPERCLASSES.values()) for name in names.split()}
    table = torch.tensor([of_class[name] for name in data.class_names])

    def mapped(split: Split) -> Split:
        return Split(split.images, table.to(split.labels.device)[split.labels])

    splits = {name: mapped(getattr(data, name)) for name in ("train", "val", "test")}
    return replace(data, **splits, classes=len(SUPERCLASSES), class_names=tuple(SUPERCLASSES))
