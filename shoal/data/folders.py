"""Readers of image folders, including Tiny-ImageNet's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shoal.data.readers import Arrays, arrays, read_text
from shoal.errors import ShoalError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


# ---- images in folders


def _decode(path: Path, size: int | None) -> np.ndarray:
    from PIL import Image  # imported here, because the other sets do not need Pillow

    try:
        with Image.open(path) as image:
            colour = image.convert("RGB")
            if size is not None and colour.size != (size, size):
                colour = colour.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(colour).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ShoalError(
            f"found no readable image at {path} ({error}); need PNG or JPEG; replace or remove the file"
        ) from error


def read_images(paths: Sequence[Path], size: int | None) -> np.ndarray:
    """Decode to uint8 RGB [N, 3, H, W], resized to size x size if `size` is given (the aspect ratio is not kept).

    Raises ShoalError, naming the first file that is unreadable or differs in size from the first image.
    """
    shape = _decode(paths[0], size).shape
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(lambda path: _decode(path, size), paths)):
            if image.shape != shape:
                raise ShoalError(
                    f"found an image of {image.shape[2]}x{image.shape[1]} at {paths[index]}; need "
                    f"{shape[2]}x{shape[1]} like {paths[0].name}; resize it, or give size="
                )
            images[index] = image
    return images


def list_images(folder: Path) -> list[Path]:
    """PNG and JPEG files directly in `folder`, sorted by name. Raises ShoalError when there are none."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ShoalError(f"found no image at {folder}; need at least one PNG or JPEG file; add images there")
    return files


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders in `folder`; a class's label is its position.

    Raises ShoalError when there are none.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not names:
        raise ShoalError(f"found no class folder at {folder}; need one folder of images per class; add them there")
    return names


Listing = list[tuple[Path, int]]  # image files with their labels


def list_labelled(folder: Path, labels: Mapping[str, int], inner: str = "") -> Listing:
    """Image files, with labels, in `folder`/<class>/`inner` for every class in `labels`.

    Raises ShoalError when a class has no images.
    """
    return [(path, label) for name, label in labels.items() for path in list_images(folder / name / inner)]


def read_listings(train: Listing, test: Listing, classes: int, size: int | None, where: str) -> tuple[Arrays, Arrays]:
    """Decode both splits together, because all images must have the same size.

    Raises ShoalError when an image is unreadable or differs in size.
    """
    images = read_images([path for path, _ in (*train, *test)], size)
    labels = np.array([label for _, label in (*train, *test)])
    cut = len(train)
    return arrays(images[:cut], labels[:cut], classes, where), arrays(images[cut:], labels[cut:], classes, where)


def read_folder(root: Path, size: int | None) -> tuple[Arrays, Arrays | None, int]:
    """Training arrays, test arrays and the number of classes; labels are positions in the sorted class names.

    Classes are folders in root/train and root/test, or directly in `root`; then the test arrays are None. Raises
    ShoalError when a class has no images, or a test class is not a training class.
    """
    if not any(path.is_dir() for part in ("train", "test") for path in (root / part).glob("*")):
        labels = {name: i for i, name in enumerate(list_classes(root))}
        files = list_labelled(root, labels)
        images = read_images([path for path, _ in files], size)
        return arrays(images, np.array([label for _, label in files]), len(labels), str(root)), None, len(labels)
    labels = {name: i for i, name in enumerate(list_classes(root / "train"))}
    present = list_classes(root / "test")
    for name in sorted(set(present) - labels.keys()):
        raise ShoalError(f"found class {name} at {root / 'test'}; need only classes of train/; move that folder")
    held_out = list_labelled(root / "test", {name: labels[name] for name in present})
    both = read_listings(list_labelled(root / "train", labels), held_out, len(labels), size, str(root))
    return (*both, len(labels))


# ---- Tiny-ImageNet


def _annotated(path: Path, labels: Mapping[str, int]) -> Listing:
    """Image files and labels in val_annotations.txt, for the classes in `labels`."""
    files = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ShoalError(f"found {line!r} at {path}:{number}; need FILE<tab>CLASS<tab>...; fetch the file again")
        if fields[1] in labels:
            files.append((path.parent / "images" / fields[0], labels[fields[1]]))
    return files


def read_tiny_imagenet(folder: Path, size: int | None) -> tuple[Arrays, Arrays, int]:
    """Training and validation arrays and the number of classes.

    Labels are positions in the sorted lines of wnids.txt. Raises ShoalError when files are missing or damaged.
    """
    labels = {wnid: i for i, wnid in enumerate(sorted(set(read_text(folder / "wnids.txt").split())))}
    annotations = folder / "val" / "val_annotations.txt"
    held_out = _annotated(annotations, labels)
    if not held_out:
        raise ShoalError(f"found no image of the {len(labels)} classes at {annotations}; need some; fetch it again")
    train = list_labelled(folder / "train", labels, "images")
    return (*read_listings(train, held_out, len(labels), size, str(folder)), len(labels))
