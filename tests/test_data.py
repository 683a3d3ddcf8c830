"""Sources and transforms."""

import numpy as np
import pytest
from PIL import Image

from flextok_jax.data import sources, transforms
from flextok_jax.data.decode import upright
from flextok_jax.data.folder import FolderSource
from flextok_jax.data.transforms import NUM_DRAWS, Transform

SPLITS = ("train", "test", "all")


def noise(*shape):
    return np.random.RandomState(0).randint(0, 256, shape, np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def keys(source):
    return [source.key(i) for i in range(len(source))]


# Folders.


def test_folder_labels_are_the_first_level_subfolders(tmp_path):
    for name in ("b/1.png", "a/deep/2.png", "a/3.JPG", "a/.hidden.png", "loose.png", "c/notes.ico"):
        save(tmp_path / name, noise(4, 4, 3))
    source = FolderSource(tmp_path, "all")
    names = [source.key(i) for i in range(len(source))]
    assert names == ["a/3.JPG", "a/deep/2.png", "b/1.png", "loose.png"]
    assert source.labels.tolist() == [0, 0, 1, -1] and source.classes == ["a", "b"]
    assert upright(source.read(2).image).size == (4, 4)


@pytest.mark.parametrize("part", ["train", "test", "val"])
def test_a_folder_with_one_part_alone_has_the_classes_below_it_and_holds_out(part, tmp_path):
    for i in range(20):
        save(tmp_path / part / "ab"[i % 2] / f"{i}.png", noise(2, 2, 3))
    (tmp_path / part / "metadata.csv").write_text("file_name,caption\na/no.png,lost\n")
    train, test, both = (FolderSource(tmp_path, split) for split in SPLITS)
    assert train.classes == test.classes == ["a", "b"] and set(both.labels) == {0, 1}
    assert sorted(keys(train) + keys(test)) == keys(both) and len(both) == 21 and len(test)
    save(tmp_path / "ship" / "1.png", noise(2, 2, 3))  # Beside others it is a class.
    assert FolderSource(tmp_path, "all").classes == sorted([part, "ship"])


def test_folder_hold_out_is_disjoint_complete_and_does_not_move_when_images_are_added(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i}.png", noise(2, 2, 3))
    before = {split: set(keys(FolderSource(tmp_path, split))) for split in SPLITS}
    for i in range(60, 100):
        save(tmp_path / f"{i}.png", noise(2, 2, 3))
    after = {split: set(keys(FolderSource(tmp_path, split))) for split in SPLITS}
    for parts in (before, after):
        assert parts["train"] | parts["test"] == parts["all"]
        assert not parts["train"] & parts["test"] and 0 < len(parts["test"]) < 12
    assert before["test"] < after["test"] and before["train"] < after["train"]


def test_linked_folders_are_followed_and_a_circle_of_links_ends(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", noise(2, 2, 3))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "data")
    source = FolderSource(tmp_path / "data", "all")
    assert (len(source), source.classes) == (1, ["cats"])


def test_missing_and_empty_folders_and_unknown_names_say_what_to_do(tmp_path):
    for data, words in (
        (("folder", f"{tmp_path}/no"), "no'.*--config.data.path"),
        (("folder", str(tmp_path)), "no images.*\\.png"),
        (("folder",), "--config.data.path"),
        (("cloud",), "'cloud'; allowed are folder, tfds"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            sources.make_source(sources.Data(*data), "train")


# Transforms.


def apply(transform, image, seed):
    draws = np.random.RandomState(seed).random_sample(NUM_DRAWS)
    return transform.augment(transform.fit(Image.fromarray(image), draws)[None], draws[None])[0]


@pytest.mark.parametrize("shape", [(16, 16, 3), (40, 23, 3), (5, 90, 3), (1, 1, 3)])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_transforms_are_pure_and_keep_uint8_and_shape(shape, crop):
    transform = Transform(16, crop, flip=True, shift=2, rotate=10.0, zoom=0.1)
    image = noise(*shape)
    original = image.copy()
    results = [apply(transform, image, seed) for seed in (0, 0, 1)]
    assert all(r.shape == (16, 16, 3) and r.dtype == np.uint8 for r in results)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(image, original)
    assert shape == (1, 1, 3) or (results[0] != results[2]).any()


def test_random_crop_keeps_to_its_scale_and_ratio():
    # A picture of coordinates: the crop's extent can be read from its pixels.
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    for draws in np.random.RandomState(0).random_sample((50, 40)):
        cut = transforms.random_resized_crop(image, 64, draws, (0.2, 0.5)).astype(float)
        width, height = (np.ptp(cut[..., c]) * 64 / 63 for c in (0, 1))
        assert 0.19 < width * height / 200**2 < 0.52 and 0.73 < width / height < 1.37


def test_a_random_window_is_any_square_of_the_image_as_it_is():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    windows = {image[y : y + 4, x : x + 4].tobytes() for y in range(2) for x in range(4)}
    draws = np.random.RandomState(0).random_sample((200, NUM_DRAWS))
    picture = Image.fromarray(image)
    assert {Transform(4, "window").fit(picture, d).tobytes() for d in draws} == windows
    with pytest.raises(ValueError, match="7 x 5 pixels.*data.image_size 6"):
        Transform(6, "window").fit(picture, draws[0])


def test_center_crop_is_that_of_adm_pixel_for_pixel():
    """Halved by 2x2 averages while possible, bicubic to the short side, the middle cut out."""
    image = noise(71, 110, 3)  # 110 x 71 -> 55 x 35 -> 28 x 18 by bicubic, and the middle of that.
    for axes in ((0, 1, 2), (1, 0, 2)):  # Wide and tall.
        turned = Image.fromarray(np.ascontiguousarray(image.transpose(axes)))
        halved = turned.resize([side // 2 for side in turned.size], Image.Resampling.BOX)
        small = (28, 18) if turned.width > turned.height else (18, 28)
        resized = np.asarray(halved.resize(small, Image.Resampling.BICUBIC))
        middle = resized[:, 5:23] if axes[0] == 0 else resized[5:23]
        np.testing.assert_array_equal(transforms.center_crop(turned, 18), middle)
    even = np.asarray(Image.fromarray(image[:70]).resize((55, 35), Image.Resampling.BOX))
    means = image[:70].reshape(35, 2, 55, 2, 3).mean((1, 3))
    assert np.abs(even - means).max() <= 1  # Rounded twice.


def test_affine_shift_is_exact_and_rotation_is_counter_clockwise():
    images, one = noise(1, 8, 8, 3), np.ones(1)
    moved = transforms.affine(images, 0 * one, one, np.array([[2.0, -1.0]]))
    np.testing.assert_array_equal(moved[:, :-1, 2:], images[:, 1:, :-2])
    assert not moved[:, -1].any() and not moved[:, :, :2].any()
    turned = transforms.affine(images, 90 * one, one, np.zeros((1, 2)))
    np.testing.assert_allclose(turned[0].astype(int), np.rot90(images[0]), atol=1)
    larger = transforms.affine(images, 0 * one, 2 * one, np.zeros((1, 2)))
    # Pixel (3, 3) of 8 lies half a pixel from the centre, so at twice the size a quarter.
    weights = np.array([0.75, 0.25])
    expected = np.einsum("y,x,yxc->c", weights, weights, images[0, 3:5, 3:5].astype(float))
    np.testing.assert_allclose(larger[0, 3, 3], expected, atol=1)


def test_each_augmentation_does_only_what_it_says():
    images = noise(64, 16, 16, 3)
    draws = np.random.RandomState(1).random_sample((64, NUM_DRAWS))
    np.testing.assert_array_equal(Transform(16).augment(images, draws), images)
    pictures = [Image.fromarray(image) for image in images]
    flipped = np.stack([Transform(16, flip=True).fit(p, d) for p, d in zip(pictures, draws)])
    is_mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) ^ is_mirrored).all() and 16 < is_mirrored.sum() < 48
    turned = Transform(16, quarter_turns=True).augment(images, draws)
    for turn in range(4):
        assert 8 < (turned == np.rot90(images, turn, (1, 2))).all((1, 2, 3)).sum() < 24
    shifted = Transform(16, shift=1).augment(images, draws)
    offsets = {
        (dx, dy)
        for before, after in zip(images, shifted)
        for dx in (-1, 0, 1)
        for dy in (-1, 0, 1)
        if (after[1:-1, 1:-1] == np.roll(before, (dy, dx), (0, 1))[1:-1, 1:-1]).all()
    }
    assert len(offsets) == 9
    grey = np.full_like(images, 128)
    by = Transform(16, color=0.1).augment(grey, draws).astype(int) - 128
    assert (by == by[:, :1, :1]).all() and np.abs(by).max() > 40
    together, apart = by.mean((1, 2, 3)), by[:, 0, 0] - by.mean((1, 2, 3))[:, None]
    assert np.abs(together).max() < 51 and 10 < apart.std() < 20
    for level, expected in ((0, np.maximum(by, 0)), (255, 255 + np.minimum(by, 0))):
        clipped = Transform(16, color=0.1).augment(np.full_like(images, level), draws)
        np.testing.assert_array_equal(clipped, expected)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(crop="middle"), "data.crop is 'middle'; allowed: random, window, center, none"),
        (dict(crop_scale=(0.5, 0.1)), "data.crop_scale"),
        (dict(crop_scale=(0.5,)), "data.crop_scale"),
        (dict(shift=16), "data.shift is 16"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(changes, words):
    with pytest.raises(ValueError, match=words):
        Transform(**{"image_size": 16, **changes})
