import pickle

import numpy as np
import pytest

from fedleak.data.files import find, pair, read_idx, reading, unpickle
from fedleak.errors import FedleakError, UsageError


def never(path):
    raise AssertionError("downloaded what is there")


def test_find_takes_the_first_alternative_that_exists(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("a.gz", "b", "b.gz"):
        (tmp_path / "raw" / name).touch()
    found = find("x", str(tmp_path), True, "raw", [["a", "a.gz"], ["b", "b.gz"]], never)
    assert [path.name for path in found] == ["a.gz", "b"]


def test_find_says_when_a_download_did_not_bring_the_files(tmp_path):
    with pytest.raises(FedleakError, match=r"did not bring all x files; put a in"):
        find("x", str(tmp_path / "new"), True, "raw", [["a"]], lambda path: None)


def test_find_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").touch()
    assert find("x", "~", False, "", [["a"]], never) == [tmp_path / "a"]


@pytest.mark.parametrize("array", [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.zeros(0, dtype=np.uint8)])
def test_read_idx_gives_back_the_array(array, tmp_path):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (tmp_path / "file").write_bytes(header + array.tobytes())
    assert np.array_equal(read_idx(tmp_path / "file"), array)


def test_pair_refuses_what_are_no_images_and_labels():
    images = np.zeros((3, 1, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="3 images and labels of shape"):
        pair(images, np.zeros(2))
    with pytest.raises(ValueError, match="float64"):
        pair(images.astype(float), np.zeros(3))
    with pytest.raises(ValueError, match="shape"):
        pair(images[:, 0], np.zeros(3))


def test_unpickle_wants_a_dict(tmp_path):
    (tmp_path / "file").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds a list"):
        unpickle(tmp_path / "file")


def test_reading_makes_one_line_of_any_error(tmp_path):
    message = r"^data\.root=null \(\./data\): .*file cannot be read \(KeyError\)"
    with pytest.raises(UsageError, match=message), reading(None, tmp_path / "file"):
        raise KeyError
    with pytest.raises(UsageError, match=r"cannot be read \(first\)") as caught, reading("r", tmp_path / "file"):
        raise ValueError("first\nsecond")
    assert "\n" not in str(caught.value)
