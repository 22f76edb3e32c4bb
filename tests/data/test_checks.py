"""A data set of one's own is checked: no wrong scale, layout or label passes in silence."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedleak.data import ImageData, image_folder
from fedleak.data.datasets import digits
from fedleak.errors import UsageError

GOOD = torch.zeros(4, 1, 5, 5, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 1, 0])


def made(images=GOOD, labels=LABELS, names=("a", "b")) -> ImageData:
    return ImageData("mine", images, labels, GOOD, LABELS, list(names))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": torch.rand(4, 1, 5, 5)}, r"float32; give uint8 in \[0, 255\]: images in \[0, 1\] times 255"),
        ({"images": GOOD.to(torch.int32)}, "int32; give uint8"),
        ({"images": GOOD[:, 0]}, r"grey images need a channel"),
        ({"images": torch.zeros(4, 5, 6, 3, dtype=torch.uint8)}, "channels last"),
        ({"images": GOOD[:3]}, "3 train images and 4 labels"),
        ({"images": torch.zeros(4, 1, 6, 5, dtype=torch.uint8)}, "make them alike"),
        ({"images": GOOD.numpy()}, "give a torch tensor"),
        ({"images": GOOD[:0], "labels": LABELS[:0]}, "no train images"),
        ({"labels": LABELS + 1}, "go from 1 to 2, for 2 class names; count from 0"),
        ({"labels": LABELS * 2}, "go from 0 to 2"),
        ({"labels": LABELS.float()}, "whole numbers"),
        ({"names": ("a",)}, "at least two names"),
    ],
)
def test_what_is_wrong_is_said(given, message):
    with pytest.raises(UsageError, match=message):
        made(**given)


def test_labels_of_any_width_are_taken_and_empty_classes_are_said(caplog):
    assert made(labels=LABELS.to(torch.int32)).train_labels.dtype == torch.int64
    assert not caplog.records
    made(names=("a", "b", "c"))
    assert "1 of 3 classes have no image, such as c (label 2)" in caplog.text


def test_sizes_that_cannot_fit_are_refused():
    with pytest.raises(UsageError, match=r"data\.image_size=100000: .* this machine has"):
        digits(image_size=100_000)


def folder(tmp_path, pixels: np.ndarray, *groups: str):
    for group in groups:
        for name in ("x", "y"):
            (tmp_path / group / name).mkdir(parents=True)
            for index in range(2):
                Image.fromarray(pixels).save(tmp_path / group / name / f"{index}.png")
    return image_folder(root=str(tmp_path), image_size=8, channels=1)


def test_twelve_bits_in_a_file_for_sixteen_are_not_black(tmp_path):
    pixels = np.full((8, 8), 2048, dtype=np.uint16)
    pixels[0, 0] = 4000
    assert int(folder(tmp_path, pixels, "").train_images.median()) == 128


def test_train_and_val_are_splits_and_not_classes(tmp_path):
    data = folder(tmp_path, np.full((8, 8), 9, dtype=np.uint8), "train", "val")
    assert (data.class_names, len(data.train_labels), len(data.test_labels)) == (["x", "y"], 4, 4)
