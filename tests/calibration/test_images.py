"""Images become what the stated preprocessing says, step by step; what it leaves open the model tells, or nobody."""

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest

from qdq_surgeon.calibration.images import read_images
from qdq_surgeon.calibration.preprocessing import Preprocessing
from qdq_surgeon.errors import DataError
from qdq_surgeon.model import load
from tests.calibration.feeding import IDS_AND_MASK, batches, opened, rows
from tests.graphs import model

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")

AS_IS = Preprocessing(range=(0, 255))
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def taking(shape, dtype="float"):
    """A model with one input, `x`, of that shape."""
    return f"g ({dtype}[{shape}] x) => (y) {{ y = Identity(x) }}"


def stated(**keys):
    return dataclasses.replace(AS_IS, **keys)


def image(pixels):
    """A Pillow image of [height, width, channels] or [height, width]."""
    from PIL import Image

    return Image.fromarray(np.asarray(pixels, np.uint8))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def one(tmp_path, pixels, text, preprocessing):
    """What a model is fed where the folder holds one image."""
    image(pixels).save(tmp_path / "image.png")
    (batch,) = batches(text, tmp_path, preprocessing)
    return batch.feed["x"]


# ---- values computed by hand -------------------------------------------------------------------------------


@needs_pillow
@pytest.mark.parametrize(
    ("preprocessing", "expected"),
    [
        (Preprocessing(range=(0, 255)), [255, 0, 51]),
        (Preprocessing(range=(0, 1)), [1, 0, 0.2]),
        (Preprocessing(range=(-1, 1)), [1, -1, -0.6]),
        (Preprocessing(range=(1, 0)), [0, 1, 0.8]),
        (Preprocessing(range=(0, 1), mean=0.5, std=0.25), [2, -2, -1.2]),
        (Preprocessing(range=(0, 1), mean=(1, 2, 3), std=(1, 2, 4)), [0, -1, -0.7]),
        (Preprocessing(range=(0, 255), mean=(100, 101, 102)), [155, -101, -51]),
        (Preprocessing(range=(0, 255), mean=(100, 101, 102), color="BGR"), [51 - 100, -101, 255 - 102]),
    ],
)
def test_a_pixel_is_mapped_to_the_range_and_then_normalized_per_channel(preprocessing, expected, tmp_path):
    given = one(tmp_path, [[[255, 0, 51]]], taking("N,3,1,1"), preprocessing)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given.ravel(), np.float32(expected), rtol=1e-6, atol=1e-7)


@needs_pillow
def test_rows_columns_and_channels_go_where_the_layout_says(tmp_path):
    pixels = np.arange(18).reshape(2, 3, 3)
    np.testing.assert_array_equal(one(tmp_path, pixels, taking("N,2,3,3"), stated(layout="NHWC"))[0], pixels)
    np.testing.assert_array_equal(one(tmp_path, pixels, taking("N,3,2,3"), AS_IS)[0], pixels.transpose(2, 0, 1))


@needs_pillow
def test_gray_is_the_luma_of_the_colors(tmp_path):
    given = one(tmp_path, [[RED, GREEN, BLUE, WHITE]], taking("N,1,1,4"), AS_IS)
    assert given.tolist() == [[[[76, 150, 29, 255]]]]


@needs_pillow
def test_a_gray_image_has_three_equal_channels_for_a_model_of_colors(tmp_path):
    assert one(tmp_path, [[7, 9]], taking("N,3,1,2"), AS_IS).tolist() == [[[[7, 9]], [[7, 9]], [[7, 9]]]]


@needs_pillow
def test_transparency_is_dropped(tmp_path):
    assert one(tmp_path, [[[10, 20, 30, 0]]], taking("N,3,1,1"), AS_IS).ravel().tolist() == [10, 20, 30]


@needs_pillow
def test_stretching_ignores_the_proportions(tmp_path):
    given = one(tmp_path, [[0, 100]], taking("N,1,H,W"), stated(size=(2, 4), interpolation="nearest"))
    assert given.tolist() == [[[[0, 0, 100, 100], [0, 0, 100, 100]]]]


@needs_pillow
def test_interpolation_is_antialiased(tmp_path):
    """Three pixels become one: a triangle of that width weighs four of them 2:3:2:1, and not the nearest two alone."""
    given = one(tmp_path, [[0, 0, 0, 240, 240, 240]], taking("N,1,1,2"), AS_IS)
    assert given.ravel().tolist() == [240 / 8, 240 * 7 / 8]


@needs_pillow
def test_the_shorter_side_becomes_the_size_and_the_centre_is_cut_out(tmp_path):
    pixels = [[10, 20, 30, 40]]
    keys = {"resize": "shorter side", "interpolation": "nearest"}
    assert one(tmp_path, pixels, taking("N,1,1,2"), stated(**keys, size=1)).tolist() == [[[[20, 30]]]]
    assert one(tmp_path, pixels, taking("N,1,2,2"), stated(**keys)).tolist() == [[[[20, 30], [20, 30]]]]
    given = one(tmp_path, np.transpose(pixels), taking("N,1,H,W"), stated(**keys, size=2, crop=(4, 2)))
    assert given.tolist() == [[[[20, 20], [20, 20], [30, 30], [30, 30]]]]


@needs_pillow
@pytest.mark.parametrize(("width", "left"), [(7, 2), (5, 2), (6, 2), (4, 1), (3, 0)])
def test_an_odd_rest_is_split_as_torchvision_splits_it(width, left, tmp_path):
    """CenterCrop cuts at int(round((width - crop) / 2)), and Python rounds halves to even: 0.5 to 0, 1.5 to 2."""
    given = one(tmp_path, [list(range(width))], taking("N,1,1,2"), stated(resize="shorter side", size=1))
    assert given.ravel().tolist() == [left, left + 1]


@needs_pillow
def test_the_longer_side_is_rounded_down(tmp_path):
    """torchvision's Resize: int(2 * 5 / 3) = 3, of which a crop of 3 takes all, and one of 4 finds too little."""
    pixels = np.zeros((3, 5))
    keys = stated(resize="shorter side", size=2, crop=(2, 3))
    assert one(tmp_path, pixels, taking("N,1,H,W"), keys).shape == (1, 1, 2, 3)
    with pytest.raises(DataError, match=r"image\.png is 2x3 after resizing, too small for a crop of 2x4"):
        one(tmp_path, pixels, taking("N,1,H,W"), dataclasses.replace(keys, crop=(2, 4)))


@needs_pillow
def test_a_stretched_image_may_be_cropped_too(tmp_path):
    pixels = np.arange(16).reshape(4, 4)
    assert one(tmp_path, pixels, taking("N,1,2,2"), stated(size=4, crop=2)).tolist() == [[[[5, 6], [9, 10]]]]


@needs_pillow
def test_a_letterbox_fills_up_what_the_proportions_leave_on_both_sides(tmp_path):
    keys = stated(resize="letterbox", pad=114, interpolation="nearest")
    wide = one(tmp_path, [[1, 2, 3, 4]], taking("N,1,4,4"), keys)
    assert wide.tolist() == [[[[114] * 4, [1, 2, 3, 4], [114] * 4, [114] * 4]]]
    tall = one(tmp_path, [[1], [2]], taking("N,1,4,4"), keys)
    assert tall.tolist() == [[[[114, 1, 1, 114], [114, 1, 1, 114], [114, 2, 2, 114], [114, 2, 2, 114]]]]


@needs_pillow
def test_the_pad_is_a_pixel_value_and_is_mapped_like_all(tmp_path):
    keys = Preprocessing(range=(0, 1), resize="letterbox", pad=51, mean=(0, 0.1, 0.2))
    given = one(tmp_path, [[WHITE], [WHITE]], taking("N,3,2,2"), keys)
    np.testing.assert_allclose(given[0, :, 0, 1], [0.2, 0.1, 0], atol=1e-7)


@needs_pillow
def test_an_image_is_turned_upright(tmp_path):
    """Orientation 6: the first column of what is stored is the top of what was seen."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    image([[RED, BLUE]]).save(tmp_path / "image.png", exif=exif)
    (batch,) = batches(taking("N,2,1,3"), tmp_path, stated(layout="NHWC"))
    assert batch.feed["x"].tolist() == [[[list(RED)], [list(BLUE)]]]


# ---- against another computation ---------------------------------------------------------------------------


@needs_pillow
def test_the_usual_imagenet_preparation_is_what_numpy_makes_of_it(tmp_path):
    """Resize(32), CenterCrop(24), ToTensor, Normalize: written down once more, in plain NumPy after the resizing."""
    from PIL import Image

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = [noise(40, 64, 0), noise(64, 40, 1), noise(24, 24, 2)]
    expected = []
    for index, array in enumerate(pixels):
        image(array).save(tmp_path / f"{index}.png")
        height, width = array.shape[:2]
        longer = int(32 * max(height, width) / min(height, width))
        to = (longer, 32) if width > height else (32, longer)
        resized = np.asarray(image(array).resize(to, Image.Resampling.BILINEAR), np.float64)
        top, left = (int(np.rint((side - 24) / 2)) for side in resized.shape[:2])
        cropped = resized[top : top + 24, left : left + 24]
        expected.append(((cropped / 255 - mean) / std).transpose(2, 0, 1))
    keys = Preprocessing(range=(0, 1), mean=tuple(mean), std=tuple(std), resize="shorter side", size=32)
    (batch,) = batches(taking("N,3,24,24"), tmp_path, keys)
    np.testing.assert_allclose(batch.feed["x"], np.float32(expected), rtol=1e-6, atol=1e-6)


@needs_pillow
def test_images_and_the_same_arrays_are_the_same_data(tmp_path):
    pixels = np.stack([noise(4, 5, seed) for seed in range(20)])
    for index, array in enumerate(pixels):
        image(array).save(tmp_path / f"{index:02}.png")
    arrays = (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    text = taking("N,3,4,5")
    for given, want in zip(
        batches(text, tmp_path, Preprocessing(range=(0, 1))), batches(text, {"x": arrays}), strict=True
    ):
        assert given.samples == want.samples
        np.testing.assert_array_equal(given.feed["x"], want.feed["x"])


# ---- what the model tells ----------------------------------------------------------------------------------


@needs_pillow
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("N,3,4,5", (1, 3, 4, 5)),
        ("N,4,5,3", (1, 4, 5, 3)),
        ("N,1,4,5", (1, 1, 4, 5)),
        ("N,4,5,1", (1, 4, 5, 1)),
        ("N,3,3,3", (1, 3, 3, 3)),
        ("N,3,H,W", (1, 3, 6, 7)),
        ("N,H,W,3", (1, 6, 7, 3)),
        ("N,C,H,W", (1, 3, 6, 7)),
        ("N,C,4,5", (1, 3, 4, 5)),
        ("", (1, 3, 6, 7)),
    ],
)
def test_layout_color_and_size_come_from_the_input_where_it_tells(shape, expected, tmp_path):
    keys = AS_IS if set(shape) & set("45") or shape == "N,3,3,3" else stated(size=(6, 7))
    assert one(tmp_path, noise(9, 9), taking(shape), keys).shape == expected


@needs_pillow
@pytest.mark.parametrize("dtype", ["float", "float16", "double", "bfloat16", "uint8", "int32"])
def test_values_have_the_type_of_the_input(dtype, tmp_path):
    pixels = noise(2, 2)
    given = one(tmp_path, pixels, taking("N,2,2,3", dtype), AS_IS)
    assert given.dtype.name == {"float": "float32", "double": "float64"}.get(dtype, dtype)
    np.testing.assert_array_equal(given[0].astype(np.float64), pixels)


@needs_pillow
def test_a_signed_byte_takes_a_range_around_zero(tmp_path):
    given = one(tmp_path, [[0, 128, 255]], taking("N,1,1,3", "int8"), Preprocessing(range=(-128, 127)))
    assert given.ravel().tolist() == [-128, 0, 127]


@needs_pillow
def test_images_are_cut_into_batches_like_arrays(tmp_path, caplog):
    for index in range(5):
        image(noise(2, 2)).save(tmp_path / f"{index}.png")
    feeds = opened(taking("2,3,2,2"), tmp_path, AS_IS)
    assert feeds.total == 4
    assert [batch.samples for batch in feeds.batches] == [2, 2]
    assert "the last 1 samples do not fill the model's batch of 2" in caplog.text


# ---- which files -------------------------------------------------------------------------------------------


@needs_pillow
def test_subfolders_are_walked_in_order_and_hidden_files_skipped(tmp_path):
    for value, name in enumerate(["a/2.png", "a/b/1.jpg", "b/1.PNG", "c.bmp", "größe/猫.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image(np.full((2, 2), 40 * value)).save(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "notes.txt").touch()
    (batch,) = batches(taking("N,1,2,2"), tmp_path, AS_IS)
    assert batch.feed["x"][:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]


@needs_pillow
def test_images_are_decoded_one_batch_at_a_time(tmp_path):
    for index in range(4):
        image(noise(2, 2)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    given = opened(taking("1,3,2,2"), tmp_path, AS_IS).batches
    assert [next(given).samples for _ in range(3)] == [1, 1, 1]
    with pytest.raises(DataError, match=r"3\.png is not an image that can be decoded"):
        next(given)


def broken(folder):
    image(noise(64, 64)).save(folder / "1.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-900])


def sixteen_bits(folder):
    from PIL import Image

    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(folder / "1.png")


def beside_labels(folder):
    image(noise(2, 2)).save(folder / "0.png")
    (folder / "labels.csv").touch()


def beside_a_file_without_suffix(folder):
    image(noise(2, 2)).save(folder / "0.png")
    (folder / "README").touch()


def nothing(folder):
    (folder / "sub").mkdir()


@needs_pillow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken, r"1\.jpg is not an image that can be decoded \(image file is truncated"),
        (sixteen_bits, r"1\.png has more than 8 bits per channel \(mode I;16\): convert it"),
        (beside_labels, r"labels\.csv is not an image"),
        (beside_a_file_without_suffix, "README is not an image"),
        (nothing, "holds no images"),
    ],
)
def test_what_is_no_image_is_named(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        batches(taking("N,3,2,2"), tmp_path, AS_IS)
    assert "\n" not in str(error.value)


def test_images_without_a_stated_preprocessing_are_refused_with_a_minimal_file(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.JPEG").touch()
    (tmp_path / "annotations.json").touch()
    with pytest.raises(DataError, match=r"holds images: state how .* TOML .*'range = \[0, 1\]'"):
        batches(taking("N,3,2,2"), tmp_path)


def test_a_single_image_is_refused(tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(DataError, match=r"cat\.png is one image: give the folder"):
        batches(taking("N,3,2,2"), tmp_path / "cat.png")


def test_preprocessing_is_refused_for_what_is_no_folder_of_images(tmp_path):
    np.save(tmp_path / "x.npy", rows(4))
    with pytest.raises(DataError, match=r"x\.npy is no folder: preprocessing is for folders of images"):
        read_images(tmp_path / "x.npy", load(model(taking("N,3,2,2"))), AS_IS)
    with pytest.raises(DataError, match="preprocessing is for folders of images"):
        batches(taking("N,3"), {"x": rows(4)}, AS_IS)


def test_without_pillow_the_install_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'qdq-surgeon\[images\]'"):
        batches(taking("N,3,2,2"), tmp_path, AS_IS)


# ---- what does not fit together ----------------------------------------------------------------------------


@needs_pillow
@pytest.mark.parametrize(
    ("text", "preprocessing", "message"),
    [
        (taking("N,3,H,W"), AS_IS, "takes images of any size, .N, 3, H, W.: state size"),
        (taking("N,3,8,W"), AS_IS, "state size"),
        (taking("N,3,H,W"), stated(resize="shorter side", size=8), "state crop"),
        (taking("N,3,8,8"), stated(size=9), r"has shape \[1, 3, 9, 9\], but the model wants \[N, 3, 8, 8\]"),
        (taking("N,4,8,8"), AS_IS, r"RGB in NCHW makes 3 channels, but 'x' wants \[N, 4, 8, 8\]"),
        (taking("N,3,8,8"), stated(color="gray"), "gray in NCHW makes 1 channels"),
        (taking("N,3,8,8"), stated(layout="NHWC"), "RGB in NHWC makes 3 channels"),
        (taking("N,3,8,8"), stated(mean=(1, 2)), "mean has 2 numbers for 3 channels"),
        (taking("N,1,8,8"), stated(std=(1, 2, 3)), "std has 3 numbers for 1 channels"),
        (taking("N,3,8,8", "uint8"), Preprocessing(range=(0, 1)), r"wants uint8, .* state range = \[0, 255\]"),
        (taking("N,3,8,8", "uint8"), stated(mean=0.5), "wants uint8"),
        (taking("N,3,8,8", "uint8"), stated(mean=1), "wants uint8"),
        (taking("N,3,8,8", "int8"), AS_IS, "wants int8"),
        (taking("N,3,8,8", "bool"), AS_IS, "wants bool"),
        (taking("N,3,8,8", "float16"), Preprocessing(range=(0, 1e6)), "numbers beyond float16"),
        (taking("N,10"), AS_IS, r"'x' is no batch of images: the model wants \[N, 10\]"),
        (IDS_AND_MASK, AS_IS, r"images feed one input, but the model has 2 \(ids, mask\)"),
        (taking("N,3,8,8"), stated(input="X"), "the model has no input 'X'"),
    ],
)
def test_what_does_not_fit_together_is_refused(text, preprocessing, message, tmp_path):
    image(noise(8, 8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=message) as error:
        batches(text, tmp_path, preprocessing)
    assert "\n" not in str(error.value)


@needs_pillow
def test_the_input_may_be_named(tmp_path):
    image(noise(2, 2)).save(tmp_path / "0.png")
    assert len(batches(taking("N,3,2,2"), tmp_path, stated(input="x"))) == 1


# ---- the stated preprocessing itself -----------------------------------------------------------------------


def test_a_toml_file_states_the_fields(tmp_path):
    (tmp_path / "p.toml").write_text("""
        range = [0, 1]
        mean = [0.485, 0.456, 0.406]
        std = 0.225
        resize = "shorter side"
        size = 256
        crop = [224, 192]
        pad = 114
        color = "BGR"
        layout = "NHWC"
        interpolation = "bicubic"
        input = "images"
        """)
    assert Preprocessing.from_toml(tmp_path / "p.toml") == Preprocessing(
        range=(0, 1),
        mean=(0.485, 0.456, 0.406),
        std=0.225,
        resize="shorter side",
        size=256,
        crop=(224, 192),
        pad=114,
        color="BGR",
        layout="NHWC",
        interpolation="bicubic",
        input="images",
    )


def test_the_file_that_the_error_shows_is_enough(tmp_path):
    (tmp_path / "p.toml").write_text("range = [0, 1]")
    assert Preprocessing.from_toml(str(tmp_path / "p.toml")) == Preprocessing(range=(0, 1))


RANGE = "range = [0, 1]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'range' is missing"),
        ("range = [0, 1", "cannot be read as TOML"),
        (RANGE + "mena = 1", "unknown key 'mena'. Did you mean 'mean'"),
        ("[preprocessing]\n" + RANGE, "unknown key 'preprocessing'. .*Keys: range, mean"),
        ("range = 1", "range is two different numbers"),
        ("range = [0, 0]", "range is two different numbers"),
        ("range = [0, 1, 2]", "range is two different numbers"),
        ("range = [0, nan]", "range is two different numbers"),
        ("range = [false, true]", "range is two different numbers"),
        ("range = ['0', '1']", "range is two different numbers"),
        (RANGE + "mean = 'imagenet'", "mean is a number, or one per channel, not 'imagenet'"),
        (RANGE + "mean = []", "mean is a number"),
        (RANGE + "std = [1, 0, 1]", "std is above 0"),
        (RANGE + "std = -1", "std is above 0"),
        (RANGE + "std = [[1]]", "std is a number"),
        (RANGE + "size = 0", "size is one number of pixels or .height, width., not 0"),
        (RANGE + "size = 22.5", "size is one number"),
        (RANGE + "size = true", "size is one number"),
        (RANGE + "size = [224]", "size is one number"),
        (RANGE + "crop = [224, -1]", "crop is one number"),
        (RANGE + "crop = '224'", "crop is one number"),
        (RANGE + "resize = 'shorter side'\nsize = [8, 8]", "size is one number where resize is 'shorter side'"),
        (RANGE + "resize = 'shorter'", "resize is one of 'stretch', 'shorter side', 'letterbox', not 'shorter'"),
        (RANGE + "resize = 7", "resize is one of"),
        (RANGE + "color = 'rgb'", "color is one of 'RGB', 'BGR', 'gray', not 'rgb'"),
        (RANGE + "layout = 'CHW'", "layout is one of 'NCHW', 'NHWC'"),
        (RANGE + "interpolation = 'area'", "interpolation is one of"),
        (RANGE + "pad = 256", "pad is a whole number from 0 to 255, not 256"),
        (RANGE + "pad = 114.0", "pad is a whole number"),
        (RANGE + "input = 3", "input is the name of an input, not 3"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(text, message, tmp_path):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        Preprocessing.from_toml(tmp_path / "p.toml")
    assert str(error.value).startswith(str(tmp_path / "p.toml"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.toml cannot be read"):
        Preprocessing.from_toml(tmp_path / "nowhere.toml")


def test_lists_serve_as_well_as_tuples(tmp_path):
    with pytest.raises(DataError, match="size is one number"):
        Preprocessing(range=[0, 1], resize="shorter side", size=[8, 8])
