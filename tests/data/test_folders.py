import numpy as np
import pytest
from PIL import Image

from fedleak.data.folders import class_folders, decode_all, hold_out
from fedleak.errors import UsageError

ROOT = "data.root=/somewhere"


def test_folders_inside_a_class_folder_belong_to_it(tmp_path):
    (tmp_path / "cat" / "more").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "more/c.webp", "readme.md"):
        (tmp_path / "cat" / name).touch()
    (tmp_path / "list.csv").touch()
    folder = tmp_path / "cat"
    assert class_folders(tmp_path, ROOT) == {"cat": [folder / "a.JPG", folder / "b.png", folder / "more" / "c.webp"]}


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (9, 1), (10, 2), (11, 2)])
def test_hold_out_splits_every_class(count, held, tmp_path):
    files = [tmp_path / str(index) for index in range(count)]
    train, test = hold_out({"a": files, "b": files}, seed=0)
    for name in ("a", "b"):
        assert len(test[name]) == held
        assert sorted(train[name] + test[name]) == sorted(files)
    assert (train, test) == hold_out({"a": files, "b": files}, seed=0)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_the_centre_is_kept_and_the_shorter_side_fits(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = [255, 128, 0]
    image = decode_all([save(tmp_path / "wide.png", wide)], 8, 3, ROOT)
    assert image.shape == (1, 3, 8, 8)
    assert image.flatten(2).unique(dim=2).squeeze().tolist() == [255, 128, 0]


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = decode_all([save(tmp_path / "same.png", array)], 16, 3, ROOT)
    assert np.array_equal(image[0].numpy(), array.transpose(2, 0, 1))


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((16, 16, 3), dtype=np.uint8)
    array[:8] = 255  # white above; orientation 3 turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    image = decode_all([save(tmp_path / "turned.png", array, exif=exif)], 16, 3, ROOT)[0]
    assert image[:, :8].max() == 0
    assert image[:, 8:].min() == 255


@pytest.mark.parametrize("channels", [1, 3])
def test_all_kinds_of_pixels_are_read_on_the_same_scale(channels, tmp_path):
    grey = np.full((8, 8), 100, dtype=np.uint8)
    paths = [
        save(tmp_path / "l.png", grey),
        save(tmp_path / "rgb.png", np.repeat(grey[..., None], 3, axis=2)),
        save(tmp_path / "rgba.png", np.dstack([grey] * 3 + [np.full_like(grey, 7)])),
        save(tmp_path / "deep.png", grey.astype(np.uint16) * 256 + 3),
        save(tmp_path / "l.jpg", grey, quality=100),
    ]
    Image.fromarray(grey).convert("P").save(tmp_path / "p.gif")
    images = decode_all([*paths, tmp_path / "p.gif"], 8, channels, ROOT)
    assert images.shape == (6, channels, 8, 8)
    assert images.min() == images.max() == 100


def test_a_large_jpeg_shrinks_to_what_it_shows(tmp_path):
    gradient = np.repeat(np.linspace(0, 255, 512)[None], 512, axis=0).astype(np.uint8)
    image = decode_all([save(tmp_path / "large.jpg", gradient, quality=95)], 16, 1, ROOT)[0, 0]
    expected = np.linspace(0, 255, 512).reshape(16, 32).mean(1)
    assert np.abs(image.numpy() - expected).max() < 4


def test_unreadable_images_are_counted_and_the_first_named(tmp_path):
    good = save(tmp_path / "good.png", np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    truncated, text = tmp_path / "truncated.png", tmp_path / "text.png"
    truncated.write_bytes(good.read_bytes()[:500])
    text.write_text("hello")
    with pytest.raises(UsageError, match=rf"^{ROOT}: image {text} \(and 1 more\) cannot be read: not an.*remove"):
        decode_all([good, text, truncated], 8, 1, ROOT)
    with pytest.raises(UsageError, match=rf"image {truncated} cannot be read: .*truncated"):
        decode_all([good, truncated], 8, 1, ROOT)
