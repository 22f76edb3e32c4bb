"""Every loader on small files that these tests write in the published formats."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from fedleak import data
from fedleak.errors import FedleakError, UsageError

RNG = np.random.default_rng(0)
TRAIN, TEST = 30, 10


def pixels(count, *shape):
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, classes):
    return np.arange(count, dtype=np.uint8) % classes


def write_idx(path, array, compress=False):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    if compress:
        path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(header + array.tobytes()) if compress else header + array.tobytes())


def make_idx(root, folder, compress=False):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    truth = []
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, targets = pixels(count, 28, 28), labels(count, 10)
        write_idx(raw / f"{split}-images-idx3-ubyte", images, compress)
        write_idx(raw / f"{split}-labels-idx1-ubyte", targets, compress)
        truth += [images[:, None], targets]
    return truth


def make_cifar(root, folder, train_files, test_file, meta_file, label_key, names_key, classes):
    base = root / folder
    base.mkdir(parents=True)
    truth = []
    for files, total in ((train_files, TRAIN), ([test_file], TEST)):
        images, targets = pixels(total, 3072), labels(total, classes)
        for file, some, their in zip(
            files, np.array_split(images, len(files)), np.array_split(targets, len(files)), strict=True
        ):
            (base / file).write_bytes(pickle.dumps({"data": some, label_key: their.tolist()}, protocol=2))
        truth += [images.reshape(-1, 3, 32, 32), targets]
    names = [f"class {n}" for n in range(classes)]
    (base / meta_file).write_bytes(pickle.dumps({names_key: names}, protocol=2))
    return truth


def make_cifar10(root):
    batches = [f"data_batch_{n}" for n in range(1, 6)]
    return make_cifar(root, "cifar-10-batches-py", batches, "test_batch", "batches.meta", "labels", "label_names", 10)


def make_cifar100(root):
    return make_cifar(root, "cifar-100-python", ["train"], "test", "meta", "fine_labels", "fine_label_names", 100)


def make_svhn(root):
    truth = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        images, targets = pixels(count, 3, 32, 32), labels(count, 10)
        stored = np.where(targets == 0, 10, targets)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": stored})
        truth += [images, targets]
    return truth


ARRAYS = {
    "mnist": (lambda root: make_idx(root, "MNIST"), (1, 28, 28), 10),
    "fashion_mnist": (lambda root: make_idx(root, "FashionMNIST"), (1, 28, 28), 10),
    "cifar10": (make_cifar10, (3, 32, 32), 10),
    "cifar100": (make_cifar100, (3, 32, 32), 100),
    "svhn": (make_svhn, (3, 32, 32), 10),
}


def make_people(folder, sizes=(5, 7, 1)):
    for person, count in enumerate(sizes):
        name = f"Person_{person}"
        (folder / name).mkdir(parents=True)
        for index in range(1, count + 1):
            image = np.full((40, 40, 3), 20 * person + index, dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{name}_{index:04d}.jpg", quality=95)


def make_folders(root, classes=("cat", "dog"), count=10, size=(40, 40)):
    for value, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = (50 * value, 100, index)
            Image.new("RGB", size, colour).save(root / name / f"{index:02d}.png")


def same(a, b):
    return (
        torch.equal(a.train_images, b.train_images)
        and torch.equal(a.train_labels, b.train_labels)
        and torch.equal(a.test_images, b.test_images)
        and torch.equal(a.test_labels, b.test_labels)
    )


# --- what all loaders share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
def test_images_and_labels_are_those_in_the_files(name, tmp_path):
    make, shape, classes = ARRAYS[name]
    train_images, train_labels, test_images, test_labels = make(tmp_path)
    loaded = getattr(data, name)(root=str(tmp_path))
    assert loaded.name == name
    assert loaded.image_shape == shape
    assert loaded.classes == len(loaded.class_names) == classes
    assert np.array_equal(loaded.train_images.numpy(), train_images)
    assert np.array_equal(loaded.train_labels.numpy(), train_labels)
    assert np.array_equal(loaded.test_images.numpy(), test_images)
    assert np.array_equal(loaded.test_labels.numpy(), test_labels)
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == torch.int64


@pytest.mark.parametrize("name", ARRAYS)
def test_limit_and_image_size(name, tmp_path):
    make, shape, _ = ARRAYS[name]
    make(tmp_path)
    load = getattr(data, name)
    whole, some = load(root=str(tmp_path)), load(root=str(tmp_path), limit=7)
    assert len(some.train_labels) == len(some.train_images) == 7
    assert len(some.test_labels) == TEST
    found = [(whole.train_images == image).flatten(1).all(1).nonzero().item() for image in some.train_images]
    assert found == sorted(set(found))
    assert torch.equal(whole.train_labels[found], some.train_labels)
    assert same(some, load(root=str(tmp_path), limit=7))
    assert len(load(root=str(tmp_path), limit=10_000).train_labels) == TRAIN
    assert load(root=str(tmp_path), image_size=16).image_shape == (shape[0], 16, 16)


@pytest.mark.parametrize("name", [*ARRAYS, "lfw"])
def test_a_root_that_does_not_exist_or_is_empty_is_named_with_the_mend(name, tmp_path):
    load = getattr(data, name)
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError) as caught:
            load(root=str(root))
        message = str(caught.value)
        assert message.startswith(f"data.root={root} ")
        assert "data.download=true" in message
        assert "put " in message
        assert "\n" not in message
    assert not (tmp_path / "nowhere").exists()


def test_the_mend_names_the_files_and_their_folder(tmp_path):
    with pytest.raises(UsageError, match=rf"train-images-idx3-ubyte, .*t10k-labels-idx1-ubyte in {tmp_path}/MNIST/raw"):
        data.mnist(root=str(tmp_path))


def test_without_a_root_it_is_data_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^data\.root=null \(\./data\) does not exist"):
        data.mnist()
    make_idx(tmp_path / "data", "MNIST")
    assert len(data.mnist().train_labels) == TRAIN


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for load in (data.mnist, data.image_folder):
        with pytest.raises(UsageError, match=r"^data\.root=.*is a file"):
            load(root=str(tmp_path / "file"))


@pytest.mark.parametrize("name", [*ARRAYS, "lfw"])
def test_a_download_only_when_asked_and_its_failure_is_told(name, tmp_path, monkeypatch):
    import sklearn.datasets
    import torchvision.datasets

    calls = []

    def offline(*args, **kwargs):
        calls.append(args)
        raise OSError("no network")

    for published in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"):
        monkeypatch.setattr(torchvision.datasets, published, offline)
    monkeypatch.setattr(sklearn.datasets, "fetch_lfw_people", offline)
    with pytest.raises(UsageError):
        getattr(data, name)(root=str(tmp_path))
    assert not calls
    with pytest.raises(FedleakError, match=rf"^data\.download=true failed for {name} \(OSError: no network\); .*put"):
        getattr(data, name)(root=str(tmp_path / "new"), download=True)
    assert len(calls) == 1


def test_a_download_brings_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    import torchvision.datasets

    calls = []

    def fetch(root, download):
        calls.append(root)
        make_idx(tmp_path / "new", "MNIST")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    for _ in range(2):
        assert len(data.mnist(root=str(tmp_path / "new"), download=True).train_labels) == TRAIN
    assert calls == [str(tmp_path / "new")]


@pytest.mark.parametrize("key", ["limit", "image_size"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8", True])
def test_impossible_numbers_are_refused(key, value):
    with pytest.raises(UsageError, match=rf"^data\.{key}={value} is impossible; give"):
        data.digits(**{key: value})


def test_to_float_maps_to_the_unit_interval():
    images = data.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert images.dtype == torch.float32
    assert images.tolist() == pytest.approx([0, 0.2, 1])


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learn_s_and_need_no_files():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    loaded = data.digits(image_size=None)
    assert loaded.image_shape == (1, 8, 8)
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (1438, 359)
    together = torch.cat([loaded.train_images, loaded.test_images])[:, 0]
    expected = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in together.numpy()) == sorted(image.tobytes() for image in expected)
    by_image = {image.tobytes(): label for image, label in zip(expected, bunch.target, strict=True)}
    assert all(
        by_image[image.numpy().tobytes()] == label
        for image, label in zip(loaded.test_images[:, 0], loaded.test_labels, strict=True)
    )


def test_digits_at_lenet_s_size_always_alike():
    loaded = data.digits()
    assert loaded.image_shape == (1, 28, 28)
    assert loaded.classes == 10
    assert loaded.train_images.max() == 255
    torch.manual_seed(3)
    assert same(loaded, data.digits())
    # Every class is held out about alike: 36 of each are expected.
    assert torch.bincount(loaded.test_labels).min() > 20


def test_digits_refuse_a_root_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match=r"^data\.root=.*nowhere does not exist"):
        data.digits(root=str(tmp_path / "nowhere"))
    assert same(data.digits(root=str(tmp_path)), data.digits())


# --- broken files ----------------------------------------------------------------------------------------------------


def test_gzipped_idx_files_are_read(tmp_path):
    train_images, *_ = make_idx(tmp_path, "MNIST", compress=True)
    assert np.array_equal(data.mnist(root=str(tmp_path)).train_images.numpy(), train_images)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "foreign", "labels", "gzip"])
def test_a_broken_idx_file_is_named(damage, tmp_path):
    make_idx(tmp_path, "MNIST", compress=damage == "gzip")
    suffix = ".gz" if damage == "gzip" else ""
    file = tmp_path / "MNIST" / "raw" / f"train-images-idx3-ubyte{suffix}"
    content = file.read_bytes()
    if damage == "labels":
        file = file.with_name("train-labels-idx1-ubyte")
        write_idx(file, labels(TRAIN - 1, 10))
    else:
        file.write_bytes(
            {"truncated": content[:-5], "emptied": b"", "foreign": b"\x89PNG...."}.get(damage, content[:40])
        )
    with pytest.raises(UsageError, match=rf"^data\.root={tmp_path}: {file} cannot be read .*again"):
        data.mnist(root=str(tmp_path))


def test_a_broken_cifar_or_svhn_file_is_named(tmp_path):
    make_cifar10(tmp_path)
    make_svhn(tmp_path)
    for load, file in ((data.cifar10, "cifar-10-batches-py/data_batch_3"), (data.svhn, "test_32x32.mat")):
        path = tmp_path / file
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(UsageError, match=rf"{path} cannot be read"):
            load(root=str(tmp_path))


class Payload:
    def __reduce__(self):
        return (print, ("the pickle ran code",))


def test_a_cifar_file_cannot_run_code(tmp_path, capsys):
    make_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Payload()}))
    with pytest.raises(UsageError, match=r"builtins\.print"):
        data.cifar100(root=str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_pickles_of_every_protocol_are_read(protocol, tmp_path):
    train_images, *_ = make_cifar100(tmp_path)
    file = tmp_path / "cifar-100-python" / "train"
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol=protocol))
    assert np.array_equal(data.cifar100(root=str(tmp_path)).train_images.numpy(), train_images)


def test_labels_outside_the_classes_are_refused(tmp_path):
    make_idx(tmp_path, "MNIST")
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.full(TRAIN, 11, dtype=np.uint8))
    with pytest.raises(UsageError, match="labels from 0 to 11 for 10 classes"):
        data.mnist(root=str(tmp_path))


# --- class folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["lfw-py/lfw_funneled", "lfw-py/lfw", "lfw_home/lfw_funneled", "lfw-deepfunneled", "."]
)
def test_lfw_is_found_where_its_tools_put_it(place, tmp_path):
    make_people(tmp_path / place)
    loaded = data.lfw(root=str(tmp_path))
    assert loaded.image_shape == (3, 32, 32)
    assert loaded.class_names == ["Person_0", "Person_1", "Person_2"]
    assert torch.bincount(loaded.train_labels).tolist() == [4, 6, 1]
    assert torch.bincount(loaded.test_labels).tolist() == [1, 1]
    assert same(loaded, data.lfw(root=str(tmp_path)))
    # The grey value was 20 × person + index: every image is there once, in its person's class.
    values = torch.cat([loaded.train_images, loaded.test_images]).float().mean((1, 2, 3)).round().long()
    people = torch.cat([loaded.train_labels, loaded.test_labels])
    assert sorted((values - 20 * people).tolist()) == sorted([*range(1, 6), *range(1, 8), 1])


def test_lfw_people_with_few_images_can_be_left_out(tmp_path):
    make_people(tmp_path)
    assert data.lfw(root=str(tmp_path), min_images=5).class_names == ["Person_0", "Person_1"]
    with pytest.raises(UsageError, match=r"^data\.min_images=6 leaves 1 people"):
        data.lfw(root=str(tmp_path), min_images=6)
    with pytest.raises(UsageError, match=r"^data\.min_images=0 "):
        data.lfw(root=str(tmp_path), min_images=0)


def test_image_folder_holds_out_one_in_five_of_each_class(tmp_path):
    make_folders(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".hidden.png").write_text("not an image")
    loaded = data.image_folder(root=str(tmp_path))
    assert loaded.class_names == ["cat", "dog"]
    assert loaded.image_shape == (3, 32, 32)
    assert torch.bincount(loaded.train_labels).tolist() == [8, 8]
    assert torch.bincount(loaded.test_labels).tolist() == [2, 2]
    for split, of in ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels)):
        assert torch.equal(split[:, 0, 0, 0].long(), 50 * of)
    indices = torch.cat([loaded.train_images, loaded.test_images])[:, 2, 0, 0]
    assert sorted(indices.tolist()) == sorted([*range(10), *range(10)])
    assert same(loaded, data.image_folder(root=str(tmp_path)))


def test_image_folder_with_a_test_split_of_its_own(tmp_path):
    make_folders(tmp_path / "train", count=3)
    make_folders(tmp_path / "test", classes=("cat",), count=2)
    loaded = data.image_folder(root=str(tmp_path))
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (6, 2)
    assert loaded.class_names == ["cat", "dog"]
    make_folders(tmp_path / "test", classes=("emu",), count=1)
    with pytest.raises(UsageError, match="class emu in test and not in train"):
        data.image_folder(root=str(tmp_path))


def test_image_folder_in_grey_and_limited(tmp_path):
    make_folders(tmp_path)
    loaded = data.image_folder(root=str(tmp_path), channels=1, image_size=8, limit=5)
    assert loaded.image_shape == (1, 8, 8)
    assert len(loaded.train_labels) == 5
    assert len(loaded.test_labels) == 4
    for value in (2, 0, True, "rgb", None):
        with pytest.raises(UsageError, match=rf"^data\.channels={value} "):
            data.image_folder(root=str(tmp_path), channels=value)


def test_image_folder_needs_a_root_and_a_size(tmp_path):
    make_folders(tmp_path)
    with pytest.raises(UsageError, match=r"^data\.root=null "):
        data.image_folder()
    with pytest.raises(UsageError, match=r"^data\.root=.*nowhere does not exist"):
        data.image_folder(root=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"^data\.image_size=null "):
        data.image_folder(root=str(tmp_path), image_size=None)


def test_image_folder_names_what_is_wrong_with_the_folders(tmp_path):
    with pytest.raises(UsageError, match=rf"^data\.root={tmp_path}: .* no class folders"):
        data.image_folder(root=str(tmp_path))
    make_folders(tmp_path, classes=("cat",), count=2)
    with pytest.raises(UsageError, match=rf"^data\.root={tmp_path} has one class, cat"):
        data.image_folder(root=str(tmp_path))
    (tmp_path / "dog").mkdir()
    (tmp_path / "emu").mkdir()
    with pytest.raises(UsageError, match=rf"class folder {tmp_path}/dog \(and 1 more\) has no images"):
        data.image_folder(root=str(tmp_path))


def test_image_folder_without_anything_to_hold_out_is_refused(tmp_path):
    make_folders(tmp_path, count=1)
    with pytest.raises(UsageError, match="2 training and 0 test images"):
        data.image_folder(root=str(tmp_path))
