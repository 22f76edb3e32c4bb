"""Data sets as plain arrays. Every loader takes the same arguments, so that ``data=NAME`` is all that changes.

The files are read here, in the layout that torchvision keeps under `root`, and torchvision (scikit-learn for LFW) only
downloads them: so that copies and subsets without the published checksums work too.

Args of every loader:
    root: the folder that torchvision calls root; None is ./data.
    download: fetch the files into `root` if they are not there.
    image_size: resize to this height and width in pixels, bilinearly; None keeps the data set's own.
    limit: at most so many training images, a fixed random subset.

Raises of every loader:
    UsageError: `root` or its files are missing or broken, or an argument is impossible.
    FedleakError: a download failed.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedleak.data.checks import check_images
from fedleak.data.files import find, folder_of, pair, read_idx, reading, shown, unpickle
from fedleak.data.folders import class_folders, decode_all, depth, hold_out
from fedleak.errors import UsageError

DIGIT_NAMES = [str(digit) for digit in range(10)]
FASHION_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
]  # fmt: skip
FIXED_SEED = 0  # splits and subsets are part of the data set: they do not move with the run's seed


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set in memory.

    Attributes:
        name: the data set's name.
        train_images: ``[N, C, H, W]`` uint8; the clients' images.
        train_labels: ``[N]`` int64 in [0, classes).
        test_images: ``[M, C, H, W]`` uint8; held out for the shared model's test accuracy.
        test_labels: ``[M]`` int64 in [0, classes).
        class_names: a name for every class, in label order.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]

    def __post_init__(self) -> None:
        check_images(self)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def to_float(images: Tensor) -> Tensor:
    """Images uint8 in [0, 255] as float32 in [0, 1], any shape."""
    return images.to(torch.float32) / 255


def digits(
    *, root: str | None = None, download: bool = False, image_size: int | None = 28, limit: int | None = None
) -> ImageData:
    """Handwritten digits from inside scikit-learn (UCI; Alpaydin and Kaynak 1998): real images, no download.

    1,797 images of 8×8 pixels in 17 grey levels, enlarged bilinearly to `image_size`; one in five is held out.
    `root` and `download` are not used, but a `root` that does not exist is an error here too.
    """
    if root is not None and not folder_of(root).is_dir():
        raise UsageError(f"data.root={root} does not exist; data=digits needs no files: leave data.root=null")
    table = torch.from_numpy(_digits_table())
    images = table[:, :-1].reshape(-1, 1, 8, 8).to(torch.float32) * (255 / 16)
    labels = table[:, -1].to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(FIXED_SEED))
    test, train = order[: len(labels) // 5], order[len(labels) // 5 :]
    size = 8 if image_size is None else image_size
    return _finish("digits", (images[train], labels[train]), (images[test], labels[test]), DIGIT_NAMES, size, limit)


def _digits_table() -> np.ndarray:
    """``[1797, 65]``: pixels and label, out of scikit-learn's folder, which need not be imported for it."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise UsageError("data=digits: scikit-learn holds them and is not installed; pip install scikit-learn")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        with gzip.open(path, "rt") as file:
            return np.array([line.split(",") for line in file], dtype=np.float64)
    from sklearn.datasets import load_digits  # a release that keeps them elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def mnist(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """MNIST (LeCun et al. 1998): handwritten digits, 60,000 + 10,000, 1×28×28; root/MNIST/raw/*-ubyte or *-ubyte.gz."""
    return _idx("mnist", "MNIST", DIGIT_NAMES, root, download, image_size, limit)


def fashion_mnist(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017): clothes, 60,000 + 10,000, 1×28×28; root/FashionMNIST/raw/*-ubyte(.gz)."""
    return _idx("fashion_mnist", "FashionMNIST", FASHION_NAMES, root, download, image_size, limit)


def cifar10(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000, 3×32×32; root/cifar-10-batches-py/."""
    train = [f"data_batch_{part}" for part in range(1, 6)]
    location = "cifar-10-batches-py", train, "test_batch", "batches.meta"
    return _cifar("cifar10", "CIFAR10", location, ("labels", "label_names"), root, download, image_size, limit)


def cifar100(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """CIFAR-100 (Krizhevsky 2009), fine labels: 50,000 + 10,000, 3×32×32; root/cifar-100-python/."""
    location = "cifar-100-python", ["train"], "test", "meta"
    keys = "fine_labels", "fine_label_names"
    return _cifar("cifar100", "CIFAR100", location, keys, root, download, image_size, limit)


def svhn(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """SVHN (Netzer et al. 2011): house numbers, 73,257 + 26,032, 3×32×32; root/train_32x32.mat and test_32x32.mat."""
    from scipy.io import loadmat

    def fetch(path: Path) -> None:
        from torchvision.datasets import SVHN

        for split in ("train", "test"):
            SVHN(str(path), split=split, download=True)

    names = ["train_32x32.mat", "test_32x32.mat"]
    splits = []
    for path in find("svhn", root, download, "", [[name] for name in names], fetch):
        with reading(root, path):
            content = loadmat(path)
            labels = content["y"].reshape(-1).astype(np.int64) % 10  # the files call the digit 0 a 10
            splits.append(pair(content["X"].transpose(3, 2, 0, 1), labels))
    return _finish("svhn", splits[0], splits[1], DIGIT_NAMES, image_size, limit)


def lfw(
    *,
    root: str | None = None,
    download: bool = False,
    image_size: int | None = 32,
    limit: int | None = None,
    min_images: int = 1,
) -> ImageData:
    """Labeled Faces in the Wild (Huang et al. 2007): 13,233 colour photographs of 5,749 people, a class a person.

    Read from a folder of a folder a person: root/lfw-py/lfw_funneled as torchvision has it, the same with ``lfw`` or
    ``lfw-deepfunneled``, root/lfw_home/lfw_funneled (scikit-learn, which does the download), or `root` itself. One
    image in five of each person is held out (at least one; none of a person with a single image).

    Args:
        root, download, image_size, limit: as for every loader.
        min_images: only people with at least so many images.
    """
    _whole("data.min_images", min_images)

    def fetch(path: Path) -> None:
        from sklearn.datasets import fetch_lfw_people

        fetch_lfw_people(data_home=str(path), min_faces_per_person=500)  # downloads all, then reads one person

    sets = ["lfw_funneled", "lfw", "lfw-deepfunneled"]
    places = [f"{parent}{name}" for parent in ("lfw-py/", "lfw_home/", "") for name in sets]
    if any(folder_of(root).glob("*/*.jpg")):
        places.append(".")
    (folder,) = find(
        "lfw", root, download, "", [places], fetch, what="the folder lfw-py/lfw_funneled of people's folders"
    )
    people = {name: files for name, files in class_folders(folder, shown(root)).items() if len(files) >= min_images}
    if len(people) < 2:
        raise UsageError(f"data.min_images={min_images} leaves {len(people)} people of {folder}; give a smaller number")
    train, test = hold_out(people, FIXED_SEED)
    return _decode("lfw", root, train, test, list(people), image_size, limit, channels=3)


def image_folder(
    *,
    root: str | None = None,
    download: bool = False,
    image_size: int | None = 32,
    limit: int | None = None,
    channels: int = 3,
) -> ImageData:
    """Anyone's images: a folder of a folder a class, in any format that Pillow reads.

    `root` holds the class folders, or ``train`` and ``test`` that each hold them. Without ``test`` one image in five of
    each class is held out (at least one; none of a class with a single image). Images are scaled so that the shorter
    side fits, and cropped to the centre. Hidden files and files without an image's suffix are skipped.

    Args:
        root: the folder; has no default here.
        download: not used.
        image_size: height and width in pixels; required.
        limit: as for every loader.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        UsageError: as for every loader; also for an image that cannot be read, a class folder without images, fewer
            than two classes, or a class in ``test`` alone.
    """
    if channels not in (1, 3) or isinstance(channels, bool):
        raise UsageError(f"data.channels={channels} is impossible; give 3 for colour or 1 for grey")
    if root is None:
        raise UsageError(
            "data.root=null names no images; give data=image_folder the folder that holds a folder a class"
        )
    path, mend = folder_of(root), "give the folder that holds a folder of images a class"
    if not path.is_dir():
        raise UsageError(f"data.root={root} {'is a file' if path.exists() else 'does not exist'}; {mend}")
    held_out = next((name for name in ("test", "val", "valid", "validation") if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held_out is not None:
        train, test = class_folders(path / "train", shown(root)), class_folders(path / held_out, shown(root))
        if strange := [name for name in test if name not in train]:
            raise UsageError(
                f"data.root={root} has class {strange[0]} in {held_out} and not in train; give both the same"
            )
        names = list(train)
    else:
        classes = class_folders(path, shown(root))
        names = list(classes)
        train, test = hold_out(classes, FIXED_SEED)
    if len(names) < 2:
        raise UsageError(f"data.root={root} has one class, {names[0]}; {mend}, at least two")
    return _decode("image_folder", root, train, test, names, image_size, limit, channels)


# --- formats that two data sets share ---------------------------------------------------------------------------------


def _idx(
    name: str,
    torchvision_name: str,
    class_names: list[str],
    root: str | None,
    download: bool,
    image_size: int | None,
    limit: int | None,
) -> ImageData:
    """A data set in MNIST's format."""

    def fetch(path: Path) -> None:
        import torchvision.datasets

        getattr(torchvision.datasets, torchvision_name)(str(path), download=True)

    files = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    alternatives = [[file, f"{file}.gz"] for file in files]
    paths = find(name, root, download, f"{torchvision_name}/raw", alternatives, fetch)
    splits = []
    for images, labels in (paths[:2], paths[2:]):
        with reading(root, images):
            pixels = read_idx(images)[:, None]
        with reading(root, labels):
            splits.append(pair(pixels, read_idx(labels)))
    return _finish(name, splits[0], splits[1], class_names, image_size, limit)


def _cifar(
    name: str,
    torchvision_name: str,
    location: tuple[str, list[str], str, str],
    keys: tuple[str, str],
    root: str | None,
    download: bool,
    image_size: int | None,
    limit: int | None,
) -> ImageData:
    """A data set in CIFAR's format."""

    def fetch(path: Path) -> None:
        import torchvision.datasets

        getattr(torchvision.datasets, torchvision_name)(str(path), download=True)

    folder, train_files, test_file, names_file = location
    labels_key, names_key = keys
    files = [*train_files, test_file, names_file]
    paths = find(name, root, download, folder, [[file] for file in files], fetch)
    parts = []
    for path in paths[:-1]:
        with reading(root, path):
            content = unpickle(path)
            parts.append(pair(np.asarray(content["data"]).reshape(-1, 3, 32, 32), np.asarray(content[labels_key])))
    with reading(root, paths[-1]):
        class_names = [str(class_name) for class_name in unpickle(paths[-1])[names_key]]
    train = torch.cat([images for images, _ in parts[:-1]]), torch.cat([labels for _, labels in parts[:-1]])
    return _finish(name, train, parts[-1], class_names, image_size, limit)


def _decode(
    name: str,
    root: str | None,
    train: dict[str, list[Path]],
    test: dict[str, list[Path]],
    class_names: list[str],
    image_size: int | None,
    limit: int | None,
    channels: int,
) -> ImageData:
    """Read class folders; only those images that `limit` leaves."""
    if image_size is None:
        raise UsageError(f"data.image_size=null leaves images of different sizes; give data={name} a size, say 32")
    _whole("data.image_size", image_size)
    label = {class_name: index for index, class_name in enumerate(class_names)}
    pairs = []
    bits = depth([path for files in (train, test) for paths in files.values() for path in paths])
    for files, most in ((train, limit), (test, None)):
        listed = [(path, label[class_name]) for class_name, paths in files.items() for path in paths]
        _refuse_giants(min(len(listed), most or len(listed)), channels, image_size)
        chosen = [listed[index] for index in _subset(len(listed), most).tolist()]
        images = decode_all([path for path, _ in chosen], image_size, channels, shown(root), bits)
        pairs.append((images, torch.tensor([index for _, index in chosen], dtype=torch.int64)))
    return _finish(name, pairs[0], pairs[1], class_names, image_size, limit)


# --- what all have in common -----------------------------------------------------------------------------------------


def _finish(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    image_size: int | None,
    limit: int | None,
) -> ImageData:
    """Take the subset, resize, and check what a loader read: images ``[N, C, H, W]`` on the scale [0, 255]."""
    chosen = _subset(len(train[1]), limit)
    (train_images, train_labels), (test_images, test_labels) = (train[0][chosen], train[1][chosen]), test
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise UsageError(
            f"data={name} has {len(train_labels)} training and {len(test_labels)} test images; needs some of both"
        )
    labels = torch.cat([train_labels, test_labels])
    if int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
        raise UsageError(
            f"data={name} has labels from {int(labels.min())} to {int(labels.max())} for {len(class_names)} classes; "
            "get its files again"
        )
    return ImageData(
        name,
        _resize(train_images, image_size),
        train_labels,
        _resize(test_images, image_size),
        test_labels,
        list(class_names),
    )


def _subset(count: int, limit: int | None) -> Tensor:
    """Indices of a fixed random subset, in the order of the data set; all of them without a limit."""
    if limit is None:
        return torch.arange(count)
    _whole("data.limit", limit)
    return torch.randperm(count, generator=torch.Generator().manual_seed(FIXED_SEED))[:limit].sort().values


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Square images uint8 ``[N, C, size, size]``; bilinear, with antialiasing where they shrink."""
    if size is not None:
        _whole("data.image_size", size)
        _refuse_giants(len(images), images.shape[1], size)
        if images.shape[-2:] != (size, size):
            images = torch.cat([_interpolate(part, size) for part in images.split(1024)])
    return images.round().clamp(0, 255).to(torch.uint8) if images.is_floating_point() else images


def _interpolate(images: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(
        images.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8)  # at once: float32 takes four times the memory


def _refuse_giants(count: int, channels: int, size: int) -> None:
    """Raise `UsageError` where images of a size would not fit into half of this machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not everywhere
        memory = 16 * 2**30
    needed = channels * size**2 * max(count, 8)
    if needed > memory / 2:
        raise UsageError(
            f"data.image_size={size}: {count} such images take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f}; give a smaller size, or data.limit"
        )


def _whole(key: str, value: Any) -> None:
    """Refuse anything but a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{key}={value} is impossible; give a whole number above 0")
