"""Readers of published layouts, splits and augmentation. Each test writes the little data that it reads."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import cifar, loading
from shoal.data.augment import POLICIES, augment_batch
from shoal.data.dataset import NAMES, Split, batches
from shoal.data.loading import load
from shoal.data.splits import stratified_order
from shoal.errors import ShoalError
from tests.support.layouts import (
    WRITERS,
    check,
    seeded,
    write_archive,
    write_cifar,
    write_fashion,
    write_folder,
    write_image,
    write_svhn,
    write_tiny,
)

FAST = settings(max_examples=300)


def test_digits() -> None:
    data = load("digits")
    check(data, 1132, 126, 539, (1, 16, 16), 10)
    assert data.augment == "none"
    assert data.train.images.max() > 240
    again = load("digits", seed=1)
    assert torch.equal(again.test.images, data.test.images)
    assert not torch.equal(again.val.images, data.val.images)
    assert load("digits", size=8).shape == (1, 8, 8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "fashion-mnist"])
def test_fashion(tmp_path: Path, suffix: str, inner: str) -> None:
    written = write_fashion(tmp_path / inner, suffix=suffix)
    data = load("fashion-mnist", tmp_path, val=0)
    check(data, 40, 0, 40, (1, 32, 32), 10)
    assert np.array_equal(data.train.images[:, 0, 2:30, 2:30].numpy(), written)
    assert data.train.images[:, :, :2].sum() == 0
    assert load("fashion-mnist", tmp_path, size=16).shape == (1, 16, 16)


@pytest.mark.parametrize(("name", "counts"), [("cifar10", (90, 10, 20)), ("cifar100", (90, 10, 100))])
def test_cifar_folder(tmp_path: Path, name: str, counts: tuple[int, int, int]) -> None:
    folder = write_cifar(tmp_path, name)
    data = load(name, tmp_path)
    check(data, *counts, (3, 32, 32), {"cifar10": 10, "cifar100": 100}[name])
    assert data.augment == "crop-flip"
    assert torch.equal(load(name, folder).train.images, data.train.images)


def test_cifar_pixels_are_planes_of_rows(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar100")
    raw = pickle.loads((folder / "test").read_bytes())[b"data"]
    image = load("cifar100", tmp_path).test.images[3].numpy()
    assert image[2, 5, 7] == raw[3, 2 * 1024 + 5 * 32 + 7]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write_archive(tmp_path, name)
    with pytest.raises(ShoalError, match="MD5"):
        load(name, tmp_path)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(loading._CIFAR, name, replace(loading._CIFAR[name], md5=md5))
    check(load(name, tmp_path), 90, 10, {"cifar10": 20, "cifar100": 100}[name], (3, 32, 32), int(name[5:]))
    assert list(tmp_path.iterdir()) == [path]


def test_cifar_written_by_python_2() -> None:
    """Python 2's strings are the bytes of the published files: the opcodes differ from Python 3's protocol 2."""
    row = bytes(range(256)) * 12
    raw = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + row + b"tbU\x06labelsq\x08]q\tK\x07au."
    )
    images, labels = cifar.parse_cifar(raw, b"labels", 10, "batch")
    assert images.numpy().tobytes() == row
    assert labels.tolist() == [7]


@pytest.mark.parametrize("inner", ["", "svhn"])
def test_svhn(tmp_path: Path, inner: str) -> None:
    write_svhn(tmp_path / inner)
    data = load("svhn", tmp_path, val=0.2)
    check(data, 24, 6, 30, (3, 32, 32), 10)
    assert data.test.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    data = load("tiny-imagenet", tmp_path)
    check(data, 18, 2, 4, (3, 8, 8), 2)
    # Labels follow the sorted ids, whatever the order of wnids.txt; level 20 is class n1.
    assert torch.equal((data.test.images[:, 0, 0, 0] > 30).long(), data.test.labels)
    assert load("tiny-imagenet", tmp_path / "tiny-imagenet-200", size=4).shape == (3, 4, 4)


def test_folder_with_a_test_part(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load(str(tmp_path), limit=6)
    check(data, 6, 2, 20, (3, 8, 8), 2)
    assert torch.equal((data.test.images[:, 0, 0, 0] > 100).long(), data.test.labels)
    assert data.train.labels.bincount().tolist() == [3, 3]


def test_folder_whose_test_part_lacks_a_class_keeps_the_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train",))
    write_image(tmp_path / "test" / "dog" / "a.png")
    assert load("folder", tmp_path).test.labels.tolist() == [1]


def test_folder_without_a_test_part(tmp_path: Path) -> None:
    write_folder(tmp_path, ("",))
    check(load("folder", tmp_path), 14, 2, 4, (3, 8, 8), 2)


def test_folder_with_a_class_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.jpg")
    assert load("folder", tmp_path, val=0).classes == 2


def test_folder_resizes_unequal_images(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "cat" / "odd.png", side=9)
    assert load("folder", tmp_path, size=8).shape == (3, 8, 8)


def test_default_roots_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "svhn")
    monkeypatch.setattr(loading, "DEFAULT_ROOTS", (tmp_path / "none", tmp_path))
    assert len(load("svhn").test) == 30


# ---- splits


def keys(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_train_and_val_are_disjoint_deterministic_and_follow_the_seed(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    one, same, other = (load("cifar100", tmp_path, val=0.2, seed=seed) for seed in (0, 0, 1))
    whole = load("cifar100", tmp_path, val=0)
    assert not keys(one.train) & keys(one.val)
    assert keys(one.train) | keys(one.val) == keys(whole.train)
    assert torch.equal(one.val.images, same.val.images)
    assert keys(one.val) != keys(other.val)


def test_limit_keeps_the_validation_split(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    whole, few = load("cifar10", tmp_path), load("cifar10", tmp_path, limit=30)
    assert torch.equal(whole.val.images, few.val.images)
    assert keys(few.train) < keys(whole.train)
    assert few.train.labels.bincount().tolist() == [3] * 10


@FAST
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 2**31), st.data())
def test_every_prefix_of_the_order_is_stratified(labels: list[int], seed: int, draw: st.DataObject) -> None:
    every = torch.tensor(labels)
    order = stratified_order(every, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    size = draw.draw(st.integers(0, len(labels)))
    share = every.bincount() * (size / len(labels))
    counts = every[order[:size]].bincount(minlength=len(share))
    assert (counts - share).abs().max() <= 1.0 + len(share) * 0.1


def test_take_and_to() -> None:
    split = Split(torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1), torch.arange(5))
    assert split.take([4, 0]).labels.tolist() == [4, 0]
    assert split.take(torch.tensor([2])).images.item() == 2
    assert len(split.take([])) == 0
    assert split.to("meta").images.device.type == split.to("meta").labels.device.type == "meta"


def test_normalise_and_moments() -> None:
    data = load("digits")
    normal = data.normalise(data.train.images)
    assert normal.dtype == torch.float32
    assert normal.mean().abs() < 1e-4
    assert (normal.std() - 1).abs() < 1e-3
    parts = {
        name: Split(getattr(data, name).images.repeat(1, 2, 1, 1), getattr(data, name).labels)
        for name in ("train", "val", "test")
    }
    published = replace(data, mean=(0.5, 0.0), std=(0.25, 1.0), **parts)
    images = torch.tensor([255, 51], dtype=torch.uint8).reshape(1, 2, 1, 1)
    torch.testing.assert_close(published.normalise(images).flatten(), torch.tensor([2.0, 0.2]))
    assert data.to("meta").val.images.device.type == "meta"


def test_a_constant_channel_normalises_to_finite_values(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png", level=7)
    data = load("folder", tmp_path)
    assert data.normalise(data.train.images).isfinite().all()


# ---- augmentation


PICTURES = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 1, 16, 24), (3, 2, 4, 4), (2, 1, 1, 1), (0, 3, 8, 8)])
def test_augmentation_keeps_shape_and_type_and_follows_the_generator(
    policy: str, shape: tuple[int, int, int, int]
) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded())
    before = images.clone()
    one, two = (augment_batch(images, policy, seeded(7)) for _ in range(2))
    assert one.shape == images.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, two)
    assert torch.equal(images, before)


def test_none_is_the_identity_and_draws_nothing() -> None:
    generator = seeded()
    state = generator.get_state()
    assert torch.equal(augment_batch(PICTURES, "none", generator), PICTURES)
    assert torch.equal(generator.get_state(), state)


def shifts(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    _, height, width = image.shape
    padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
    steps = range(2 * pad + 1)
    return [padded[:, y : y + height, x : x + width] for y in steps for x in steps]


def test_crop_shifts_each_image_by_its_own_draw() -> None:
    out = augment_batch(PICTURES, "crop", seeded())
    generator = seeded()
    rows, columns = (torch.randint(5, (64,), generator=generator) for _ in range(2))
    for i in range(64):
        assert torch.equal(out[i], shifts(PICTURES[i], 2)[int(rows[i] * 5 + columns[i])])
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 10


def test_flip_mirrors_about_half_of_the_images() -> None:
    cropped = augment_batch(PICTURES, "crop", seeded())
    out = augment_batch(PICTURES, "crop-flip", seeded())
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(cropped, out, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, cropped, out, strict=True))
    assert 16 < sum(mirrored) < 48


def test_cutout_zeroes_one_square() -> None:
    plain = augment_batch(PICTURES, "crop-flip", seeded())
    out = augment_batch(PICTURES, "crop-flip-cutout", seeded())
    lost = plain != out
    assert (out[lost] == 0).all()
    assert lost.any(1).sum((1, 2)).max() <= 16
    assert lost.flatten(1).any(1).float().mean() > 0.8
    heights = lost.any(1).any(2).sum(1)
    assert heights.max() == 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_cover_the_split_once(shuffle: bool) -> None:
    split = Split(PICTURES, torch.arange(64))
    drawn = list(batches(split, 10, generator=seeded(), augment="none", shuffle=shuffle))
    assert [len(labels) for _, labels in drawn] == [10] * 6 + [4]
    labels = torch.cat([labels for _, labels in drawn])
    assert torch.equal(torch.cat([images for images, _ in drawn]), PICTURES[labels])
    assert torch.equal(labels.sort().values, torch.arange(64))
    assert torch.equal(labels, torch.arange(64)) is not shuffle


def test_batches_of_an_empty_split_are_none() -> None:
    split = Split(PICTURES[:0], torch.arange(0))
    assert not list(batches(split, 10, generator=seeded(), augment="crop", shuffle=True))


def test_batches_and_policies_refuse_bad_arguments_at_once() -> None:
    split = Split(PICTURES, torch.arange(64))
    with pytest.raises(ShoalError, match="0 at batch_size"):
        batches(split, 0, generator=seeded(), augment="none", shuffle=False)
    with pytest.raises(ShoalError, match="'mixup' at augment; need one of none, crop"):
        batches(split, 1, generator=seeded(), augment="mixup", shuffle=False)
    with pytest.raises(ShoalError, match="at augment"):
        augment_batch(PICTURES, "flip", seeded())


def test_every_name_is_known_to_the_loader(tmp_path: Path) -> None:
    assert {*WRITERS, "digits"} == set(NAMES)
