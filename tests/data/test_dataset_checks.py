"""A `Dataset` that cannot be right is refused when it is made, with one sentence; usual arrays are converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError, ShoalWarning
from tests.conftest import blobs


def relabelled(labels: Any, count: int = 96) -> dict[str, Any]:
    return {"train": Split(blobs(count).train.images, labels)}


LABELS = blobs().train.labels
IMAGES = blobs().train.images


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (relabelled(LABELS + 1), "found labels 1 to 4 in train of data set 'blobs'; need 0 to 3; subtract"),
        (relabelled(LABELS - 1), "found labels -1 to 2 in train"),
        (relabelled(LABELS.float()), r"found labels torch.float32 \[96\] for 96 images in train.*need int64 \[96\]"),
        (relabelled(LABELS[:, None]), r"found labels torch.int64 \[96, 1\] for 96 images"),
        (relabelled(LABELS[:90]), r"found labels torch.int64 \[90\] for 96 images"),
        ({"train": Split(IMAGES.float(), LABELS)}, "found images torch.float32.*need uint8.*normalises itself"),
        ({"train": Split(IMAGES[:, 0], LABELS)}, r"found images torch.uint8 \[96, 8, 8\]"),
        ({"train": Split(IMAGES[:0], LABELS[:0])}, "found no training image in data set 'blobs'"),
        ({"test": Split(IMAGES[:, :, :4], LABELS)}, r"found images of shape \[1, 4, 8\] in test.*need \[1, 8, 8\]"),
        ({"val": Split(IMAGES, LABELS + 4)}, "found labels 4 to 7 in val"),
        ({"classes": 3}, "found labels 0 to 3 in train.*need 0 to 2"),
        ({"mean": (0.1, 0.2)}, "found mean .* for 1 channels; need one number"),
        ({"std": (0.0,)}, "need one number above 0"),
        ({"class_names": ("a", "b")}, "found 2 class names for 4 classes"),
    ],
)
def test_what_cannot_be_right_is_named(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ShoalError, match=text):
        replace(blobs(), **more)


def test_an_empty_validation_split_is_allowed() -> None:
    assert not len(replace(blobs(), val=Split(IMAGES[:0], LABELS[:0])).val)


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 3, 6, 5), dtype=np.uint8)
NUMBERS = np.arange(40) % 4


@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        PIXELS.transpose(0, 2, 3, 1),
        PIXELS.astype(np.int64),
        torch.from_numpy(PIXELS),
        PIXELS.astype(np.float32) / 255,
        torch.from_numpy(PIXELS).double() / 255,
    ],
)
@pytest.mark.parametrize("labels", [NUMBERS, NUMBERS.tolist(), NUMBERS[:, None], NUMBERS.astype(np.float32)])
def test_usual_arrays_become_the_same_set(images: Any, labels: Any) -> None:
    data, same = Dataset.from_arrays(images, labels, seed=3), Dataset.from_arrays(PIXELS, NUMBERS, seed=3)
    assert data.fingerprint() == same.fingerprint()
    assert (data.shape, data.classes) == ((3, 6, 5), 4)
    assert (len(data.train), len(data.val), len(data.test)) == (29, 3, 8)
    assert data.test.labels.bincount().tolist() == [2, 2, 2, 2]
    assert repr(data) == "Dataset('arrays': 3x6x5, 4 classes; 29 train, 3 validation, 8 test)"


def test_grey_images_need_no_channel_axis_and_facts_are_kept() -> None:
    data = Dataset.from_arrays(PIXELS[:, 0], NUMBERS, class_names=("a", "b", "c", "d", "e"), mean=(0.5,), std=(0.5,))
    assert (data.shape, data.classes, data.mean, data.std) == ((1, 6, 5), 5, (0.5,), (0.5,))
    held = Dataset.from_arrays(PIXELS, NUMBERS, test=(PIXELS[:4], NUMBERS[:4]))
    assert torch.equal(held.test.images, torch.from_numpy(PIXELS[:4]))


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        ((PIXELS / 255 - 0.5) / 0.25, NUMBERS, "found float images with values from -2 to 2; need pixels 0 to 255"),
        (PIXELS.astype(np.float32), NUMBERS, "found float images with values from 0 to 255"),
        (PIXELS.astype(np.int64) * 257, NUMBERS, "found pixels from 0 to 65535; need 0 to 255"),
        (PIXELS[:, :2], NUMBERS, r"found images of shape \[40, 2, 6, 5\]; need \[N, C, H, W\]"),
        (PIXELS, NUMBERS + 0.5, "found labels torch.float64"),
        (PIXELS, np.eye(4)[NUMBERS], "from one-hot rows take argmax"),
        (PIXELS, NUMBERS[:30], "found 40 images and 30 labels"),
        (PIXELS[:0], NUMBERS[:0], "found 0 images and 0 labels"),
        (PIXELS, NUMBERS - 1, "found labels -1 to 2; need integers from 0"),
        (PIXELS, NUMBERS + 1, "found labels 1 to 4; need labels from 0; subtract 1, or give .*classes=5"),
        (PIXELS, ["cat", "dog"] * 20, "found labels of type list that hold no numbers .*; need integers from 0"),
        (PIXELS, None, "found labels of type NoneType that hold no numbers"),
        ("a folder", NUMBERS, "found images of type str that hold no numbers .*; need pixels"),
    ],
)
def test_other_arrays_are_refused(images: Any, labels: Any, text: str) -> None:
    with pytest.raises(ShoalError, match=text):
        Dataset.from_arrays(images, labels)


def test_labels_may_begin_later_where_the_number_of_classes_is_given() -> None:
    assert Dataset.from_arrays(PIXELS, NUMBERS + 1, classes=5).classes == 5
    with pytest.warns(ShoalWarning, match="found one class"):
        Dataset.from_arrays(PIXELS, NUMBERS * 0)


@pytest.mark.parametrize("loader", ["x", [PIXELS], 3])
def test_what_gives_no_batches_is_refused(loader: Any) -> None:
    with pytest.raises(ShoalError, match=r"found a (str|list|int) that gives no pairs of images and labels"):
        Dataset.from_loader(loader)


def test_a_loader_of_plain_images() -> None:
    images, labels = torch.from_numpy(PIXELS), torch.from_numpy(NUMBERS)
    unit = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=7)
    data = Dataset.from_loader(unit, seed=3)
    assert data.fingerprint() == Dataset.from_arrays(PIXELS, NUMBERS, seed=3).fingerprint()
    assert len(Dataset.from_loader(unit, test=unit).test) == 40
    with pytest.raises(ShoalError, match="leave out Normalize"):
        Dataset.from_loader(DataLoader(TensorDataset(images.float() / 255 - 0.5, labels)))
    with pytest.raises(ShoalError, match="found a loader without a batch"):
        Dataset.from_loader([])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"found no folder at .*/nowhere; need a folder of images by class"):
        Dataset.from_folder(tmp_path / "nowhere")
