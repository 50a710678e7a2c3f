"""Inputs that Polygraphy saved are fed as they were; a file that holds something else is refused with its place."""

import base64
import io
import json

import numpy as np
import pytest

from qdq_surgeon.errors import DataError
from tests.calibration.feeding import BATCH_OF_4, IDS_AND_MASK, OPEN, batches, fed, rows, sizes


def encoded(array):
    file = io.BytesIO()
    np.save(file, array)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}


def saved(folder, content):
    (folder / "inputs.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "inputs.json"


def test_what_polygraphy_saves_is_what_is_fed(tmp_path):
    polygraphy_json = pytest.importorskip("polygraphy.json", reason="polygraphy is not installed")
    feeds = [{"ids": np.arange(10).reshape(2, 5) + i, "mask": rows(2 + i, 5)[:2]} for i in range(3)]
    polygraphy_json.save_json(feeds, str(tmp_path / "inputs.json"))
    given = batches(IDS_AND_MASK, tmp_path / "inputs.json")
    assert [batch.samples for batch in given] == [2, 2, 2]
    for batch, feed in zip(given, feeds, strict=True):
        for name, array in feed.items():
            np.testing.assert_array_equal(batch.feed[name], array)


def test_one_mapping_is_one_batch(tmp_path):
    assert sizes(OPEN, saved(tmp_path, {"x": encoded(rows(20))})) == [20]


def test_one_file_per_batch_is_read_in_the_order_of_the_names(tmp_path):
    for index in range(12):
        (tmp_path / f"{index:010}.json").write_text(json.dumps({"x": encoded(np.full((1, 3), index, np.float32))}))
    assert list(fed(OPEN, tmp_path, "x")[:, 0]) == list(range(12))


def test_plain_numbers_are_arrays_too(tmp_path):
    assert fed(OPEN, saved(tmp_path, [{"x": [[1, 2, 3]]}, {"x": [[4.5, 5, 6]]}]), "x").tolist() == [
        [1, 2, 3],
        [4.5, 5, 6],
    ]


def test_a_batch_is_fed_whole_and_must_fit(tmp_path):
    with pytest.raises(DataError, match=r"inputs\.json, batch 0: 'x' has shape \[8, 3\], but the model wants \[4, 3\]"):
        batches(BATCH_OF_4, saved(tmp_path, [{"x": encoded(rows(8))}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "inputs.json is not JSON"),
        ("[" * 100_000, "inputs.json is not JSON"),
        ([7], "batch 0 is a int, no mapping of input names to arrays"),
        (["x"], "batch 0 is a str"),
        ([None], "batch 0 is a NoneType"),
        ([{"lst": [], "polygraphy_class": "RunResults"}], "batch 0 is a RunResults.*--save-inputs"),
        ([{"y": encoded(rows(2))}], "batch 0 has no 'x'. It has y"),
        ([{"x": {"tensor": "AAAA", "polygraphy_class": "Tensor"}}], "'x' is a Tensor: save NumPy arrays"),
        ([{"x": {"array": [1, 2]}}], "'x' is a mapping: save NumPy arrays"),
        ([{"x": {"polygraphy_class": "ndarray"}}], "'x' is no array that Polygraphy saved .*'array'"),
        ([{"x": {"array": "%%%", "polygraphy_class": "ndarray"}}], "'x' is no array that Polygraphy saved"),
        ([{"x": {"array": "AAAA", "polygraphy_class": "ndarray"}}], "'x' is no array that Polygraphy saved"),
        ([{"x": {"array": 7, "polygraphy_class": "ndarray"}}], "'x' is no array that Polygraphy saved"),
        ([{"x": encoded(rows(2))}, {"x": encoded(rows(2, 4))}], r"batch 1: 'x' has shape \[2, 4\]"),
        ('[{"x": [[1, NaN, 3]]}]', "NaN or infinity"),
    ],
)
def test_what_is_no_list_of_feeds_is_refused_with_its_place(content, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        batches(OPEN, saved(tmp_path, content))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "inputs.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not JSON"):
        batches(OPEN, tmp_path / "inputs.json")


def test_objects_in_json_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    with pytest.raises(DataError, match="'x' is no array that Polygraphy saved"):
        batches(OPEN, saved(tmp_path, [{"x": encoded(np.array([Bomb()], object))}]))
    assert not (tmp_path / "ran").exists()
