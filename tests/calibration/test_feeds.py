"""Data from every kind of source become the same checked batches; what does not fit is refused in one sentence."""

import base64
import gc
import io
import itertools
import json
import logging
import textwrap
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdq_surgeon.calibration.collection import fingerprint
from qdq_surgeon.calibration.feeds import default_data, read_data
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.errors import DataError
from qdq_surgeon.model import load
from tests.calibration.feeding import (
    BATCH_OF_1,
    BATCH_OF_4,
    IDS,
    IDS_AND_MASK,
    IMAGES,
    OPEN,
    UNKNOWN_RANK,
    batches,
    fed,
    opened,
    rows,
    sizes,
)
from tests.graphs import model

WITH_TABLE = "g (float[N,8] x, float[8,2] table) => (y) { y = MatMul(x, table) }"
FRAME_AND_STATE = "g (float[2,1,64] s, float[1,16,8,8] x) => (y, t) { y = Relu(x)\n t = Relu(s) }"
HALF = "g (float16[N,3] x) => (y) { y = Relu(x) }"


# ---- where data come from ----------------------------------------------------------------------------------


def npz(folder, x):
    np.savez(folder / "data.npz", x=x)
    return folder / "data.npz"


def npz_as_text_path(folder, x):
    return str(npz(folder, x))


def npz_compressed(folder, x):
    np.savez_compressed(folder / "data.npz", x=x)
    return folder / "data.npz"


def npz_without_names(folder, x):
    np.savez(folder / "data.npz", x)
    return folder / "data.npz"


def npy(folder, x):
    np.save(folder / "data.npy", x)
    return folder / "data.npy"


def folder_of_files(folder, x):
    np.save(folder / "a.npy", x[:6])
    np.savez(folder / "b.npz", x=x[6:])
    (folder / "notes.txt").write_text("no data")
    return folder


def folder_of_single_samples(folder, x):
    for index, row in enumerate(x):
        np.save(folder / f"{index:03}.npy", row)
    return folder


def polygraphy_json(folder, x):
    encoded = [{"x": encode(part)} for part in (x[:12], x[12:])]
    (folder / "inputs.json").write_text(json.dumps(encoded))
    return folder / "inputs.json"


def folder_of_polygraphy_json(folder, x):
    for index, row in enumerate(x):
        (folder / f"{index:010}.json").write_text(json.dumps({"x": encode(row[None])}))
    return folder


def script(folder, x):
    np.save(folder / "rows.npy", x)
    text = f"""
        import numpy as np
        def load_data():
            for row in np.load({str(folder / "rows.npy")!r}):
                yield {{"x": row[None]}}
        """
    (folder / "loader.py").write_text(textwrap.dedent(text))
    return folder / "loader.py"


def folder_of_test_sets(folder, x):
    return saved_test_sets(folder, [{"x": x[:12]}, {"x": x[12:]}])


def mapping(folder, x):
    return {"x": x}


def mapping_of_lists(folder, x):
    return {"x": x.tolist()}


def list_of_dicts(folder, x):
    return [{"x": x[:15]}, {"x": x[15:]}]


def generator(folder, x):
    return ({"x": x[i : i + 1]} for i in range(len(x)))


def arrays_one_by_one(folder, x):
    return (row[None] for row in x)


def arrays_with_labels(folder, x):
    return [(x[:15], np.arange(15)), (x[15:], np.arange(5))]


def samples_without_batch_axis(folder, x):
    return ({"x": row} for row in x)


def map_style_dataset(folder, x):
    class Rows:
        """As a torch Dataset: no __iter__, and no IndexError at the end."""

        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return x[index % len(x)], index

    return Rows()


def mapped_npy(folder, x):
    return np.load(npy(folder, x), mmap_mode="r")


def big_endian(folder, x):
    return x.astype(">f4")


def read_only(folder, x):
    x = x.copy()
    x.flags.writeable = False
    return x


def bare_array(folder, x):
    return x


def object_with_array(folder, x):
    class OnlyArray:
        def __array__(self, dtype=None, copy=None):
            return x

    return OnlyArray()


def object_with_dlpack(folder, x):
    class OnlyDlpack:
        def __dlpack__(self, **options):
            return x.__dlpack__(**options)

        def __dlpack_device__(self):
            return x.__dlpack_device__()

    return OnlyDlpack()


def mapping_of_objects(folder, x):
    return {"x": object_with_dlpack(folder, x)}


SOURCES = [
    npz, npz_as_text_path, npz_compressed, npz_without_names, npy, mapped_npy, folder_of_files,
    folder_of_single_samples, folder_of_test_sets, polygraphy_json, folder_of_polygraphy_json, script,
    mapping, mapping_of_lists, list_of_dicts, generator, arrays_one_by_one, arrays_with_labels,
    samples_without_batch_axis, map_style_dataset, bare_array, big_endian, read_only, object_with_array,
    object_with_dlpack, mapping_of_objects,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_samples(source, tmp_path):
    x = rows(20)
    given = fed(OPEN, source(tmp_path, x), "x")
    assert given.dtype == np.dtype("float32")
    np.testing.assert_array_equal(given, x)


@pytest.mark.parametrize("source", [npz, npz_compressed, npy, mapped_npy, mapping, bare_array, big_endian])
@hypothesis.given(
    count=st.integers(1, 70), batch=st.sampled_from(["N", 1, 2]), dtype=st.sampled_from(["f4", "f8", "u1", ">f4"])
)
@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_the_same_array_is_cut_into_the_same_batches_wherever_it_lies(source, tmp_path, count, batch, dtype):
    text = OPEN.replace("N", str(batch))
    x = np.abs(10 * rows(2 * count)).astype(np.uint8).astype(dtype)
    want, given = ([b.feed["x"] for b in batches(text, data)] for data in ({"x": x}, source(tmp_path, x)))
    assert [array.dtype for array in given] == [np.dtype("float32")] * len(want)
    for one, other in zip(given, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_test_sets_are_matched_by_the_names_in_the_files(tmp_path):
    ids, mask = np.arange(10).reshape(2, 5), rows(2, 5)
    folder = saved_test_sets(tmp_path, [{"mask": mask, "ids": ids}])
    np.testing.assert_array_equal(fed(IDS_AND_MASK, folder, "ids"), ids)
    np.testing.assert_array_equal(fed(IDS_AND_MASK, folder, "mask"), mask)


def test_test_sets_with_other_names_are_matched_by_position(tmp_path):
    ids, mask = np.arange(10).reshape(2, 5), rows(2, 5)
    folder = saved_test_sets(tmp_path, [{"a": ids, "b": mask}])
    np.testing.assert_array_equal(fed(IDS_AND_MASK, folder, "mask"), mask)


def test_a_test_set_may_be_given_by_itself(tmp_path):
    x = rows(2)
    folder = saved_test_sets(tmp_path, [{"x": x}, {"x": -x}]) / "test_data_set_1"
    np.testing.assert_array_equal(fed(OPEN, folder, "x"), -x)


def test_test_sets_beside_the_model_are_used_when_nothing_is_given(tmp_path):
    x = rows(3)
    onnx.save(model(OPEN), tmp_path / "model.onnx")
    saved_test_sets(tmp_path, [{"x": x}])
    feeds = default_data(load(tmp_path / "model.onnx"))
    assert not feeds.synthetic
    np.testing.assert_array_equal(np.concatenate([batch.feed["x"] for batch in feeds.batches]), x)


def test_arrays_that_are_no_inputs_are_left_out():
    (batch,) = batches(OPEN, {"x": rows(4), "labels": np.arange(4)})
    assert list(batch.feed) == ["x"]


# ---- folders of files --------------------------------------------------------------------------------------


def test_a_folder_announces_the_samples_of_all_its_files(tmp_path):
    feeds = opened(OPEN, folder_of_files(tmp_path, rows(20)))
    assert feeds.total == sum(batch.samples for batch in feeds.batches) == 20


def test_a_folder_is_read_one_file_after_another(tmp_path):
    folder_of_files(tmp_path, rows(20))
    given = opened(OPEN, tmp_path).batches
    (tmp_path / "b.npz").write_bytes(b"PK, but not for long")
    assert next(given).samples == 6
    with pytest.raises(DataError, match=r"b\.npz"):
        next(given)


def test_a_folder_of_very_many_files_opens_none_before_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr("qdq_surgeon.calibration.feeds.HEADERS_READ_AT_ONCE", 1)
    np.save(tmp_path / "a.npy", rows(6))
    (tmp_path / "b.npy").write_bytes(b"broken")
    feeds = opened(OPEN, tmp_path)
    assert feeds.total is None
    assert next(feeds.batches).samples == 6
    with pytest.raises(DataError, match=r"b\.npy"):
        next(feeds.batches)


def test_a_file_that_does_not_fit_is_found_before_any_batch_is_read(tmp_path):
    np.save(tmp_path / "a.npy", rows(6))
    np.save(tmp_path / "b.npy", rows(6, 4))
    with pytest.raises(DataError, match=r"b\.npy: 'x' has shape \[6, 4\], but the model wants \[N, 3\]"):
        opened(OPEN, tmp_path)


def test_hidden_files_of_a_folder_are_skipped(tmp_path):
    np.save(tmp_path / "a.npy", rows(6))
    (tmp_path / "._a.npy").write_bytes(b"what macOS leaves in archives")
    assert sizes(OPEN, tmp_path) == [6]


def test_text_beside_arrays_is_no_data(tmp_path):
    np.save(tmp_path / "a.npy", rows(6))
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    assert sizes(OPEN, tmp_path) == [6]


def test_a_folder_may_hold_one_number_per_file(tmp_path):
    for value in (5, 6):
        np.save(tmp_path / f"{value}.npy", np.float32(value))
    assert fed("g (float[N] x) => (y) { y = Relu(x) }", tmp_path, "x").tolist() == [5, 6]


def test_a_file_with_one_sample_needs_its_batch_axis_outside_of_a_folder(tmp_path):
    np.save(tmp_path / "a.npy", rows(1)[0])
    with pytest.raises(DataError, match=r"has shape \[3\], but the model wants \[N, 3\]"):
        batches(OPEN, tmp_path / "a.npy")


def test_one_table_per_file_serves_all_batches_of_that_file(tmp_path):
    x, tables = rows(18, 8), rows(16, 2).reshape(2, 8, 2)
    for index in (0, 1):
        np.savez(tmp_path / f"{index}.npz", x=x[9 * index :][:9], table=tables[index])
    given = batches(WITH_TABLE, tmp_path)
    assert [batch.samples for batch in given] == [8, 1, 8, 1]
    for batch, table in zip(given, tables[[0, 0, 1, 1]], strict=True):
        np.testing.assert_array_equal(batch.feed["table"], table)


# ---- how data are cut --------------------------------------------------------------------------------------


def test_an_open_batch_takes_eight_samples_at_a_time_and_the_rest_at_the_end():
    assert sizes(OPEN, {"x": rows(36)}) == [8, 8, 8, 8, 4]


def test_an_open_batch_takes_fewer_where_none_of_four_could_be_held_out_otherwise():
    assert sizes(OPEN, {"x": rows(20)}) == [5, 5, 5, 5]


def test_an_open_batch_takes_eight_where_nothing_will_be_held_out():
    assert sizes(OPEN, {"x": rows(15)}) == [8, 7]


def test_a_negative_dimension_takes_any_number_of_samples():
    """Paddle and tf2onnx write -1 for what is open."""
    proto = model(OPEN)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert [batch.samples for batch in read_data([{"x": rows(3)}, {"x": rows(5)}], load(proto)).batches] == [3, 5]


def test_a_batch_of_one_takes_one_sample_at_a_time():
    assert shapes(BATCH_OF_1, {"x": rows(3)}) == [(1, 3)] * 3


def test_a_fixed_batch_leaves_the_remainder_out_and_says_so(caplog):
    x = rows(10)
    with caplog.at_level(logging.WARNING, "qdq_surgeon"):
        given = fed(BATCH_OF_4, {"x": x}, "x")
    np.testing.assert_array_equal(given, x[:8])
    (record,) = caplog.records
    assert "the last 2 samples do not fill the model's batch of 4" in record.getMessage()


def test_a_fixed_batch_that_is_filled_needs_no_warning(caplog):
    assert shapes(BATCH_OF_4, {"x": rows(8)}) == [(4, 3)] * 2
    assert not caplog.records


def test_one_array_per_sample_with_a_leading_axis_of_its_own():
    x = rows(12).reshape(3, 4, 3)
    assert shapes(BATCH_OF_4, {"x": x}) == [(4, 3)] * 3
    np.testing.assert_array_equal(fed(OPEN, {"x": x[:, :1]}, "x"), x[:, 0])


def test_the_single_batch_of_one_input_serves_all_batches_of_another():
    table = rows(8, 2)
    given = batches(WITH_TABLE, {"x": rows(12, 8), "table": table})
    assert [batch.feed["x"].shape[0] for batch in given] == [8, 4]
    for batch in given:
        np.testing.assert_array_equal(batch.feed["table"], table)


def test_a_batch_is_cut_along_the_inputs_with_an_open_batch_only():
    """The table has as many rows as the batch has samples, but its rows are no samples."""
    (batch,) = batches(WITH_TABLE, {"x": rows(8, 8), "table": rows(8, 2)})
    part = batch.part(0, 3)
    assert (part.feed["x"].shape, part.feed["table"].shape) == ((3, 8), (8, 2))


def test_a_single_row_that_serves_all_samples_is_not_cut():
    (batch,) = batches(IDS_AND_MASK, {"ids": np.ones((8, 5), int), "mask": rows(1, 5)})
    part = batch.part(3, 5)
    assert (part.feed["ids"].shape, part.feed["mask"].shape) == ((2, 5), (1, 5))


def test_an_input_of_unknown_rank_is_cut_along_axis_0_and_its_samples_are_counted():
    assert sizes(UNKNOWN_RANK, {"x": rows(12)}) == [8, 4]


def test_a_scalar_input_is_given_whole():
    text = "g (float[N,3] x, float k) => (y) { y = Mul(x, k) }"
    assert [batch.feed["k"].shape for batch in batches(text, {"x": rows(9), "k": np.float32(2)})] == [(), ()]


def test_a_scalar_input_may_have_one_number_per_sample():
    text = "g (float[1,3] x, float k) => (y) { y = Mul(x, k) }"
    given = [batch.feed["k"] for batch in batches(text, {"x": rows(3), "k": np.float32([5, 6, 7])})]
    assert [(k.shape, float(k)) for k in given] == [((), 5), ((), 6), ((), 7)]


@pytest.mark.parametrize("as_dicts", [False, True])
def test_a_state_with_its_layers_first_does_not_count_as_the_batch(as_dicts):
    frames = {"s": np.zeros((32, 2, 1, 64), np.float32), "x": np.zeros((32, 1, 16, 8, 8), np.float32)}
    data = [{name: array[i] for name, array in frames.items()} for i in range(32)] if as_dicts else frames
    split, used = dealt(FRAME_AND_STATE, data, 8)
    assert (split.samples, len(used)) == (8, 8)


def test_a_fixed_input_that_serves_all_batches_does_not_count_as_the_batch():
    text = "g (float[4,3] x, float[2,3] table) => (y) { t = Transpose(table)\n y = MatMul(x, t) }"
    feeds = read_data({"x": rows(8), "table": rows(2)}, load(model(text)))
    assert (feeds.total, [batch.samples for batch in feeds.batches]) == (8, [4, 4])


@pytest.mark.parametrize(
    ("text", "data"),
    [
        pytest.param(OPEN, {"x": rows(20)}, id="open batch"),
        pytest.param(BATCH_OF_1, {"x": rows(5)}, id="batch of one"),
        pytest.param(BATCH_OF_4, {"x": rows(8)}, id="batch of four"),
        pytest.param(BATCH_OF_4, {"x": rows(10)}, id="batch of four with a remainder"),
        pytest.param(BATCH_OF_4, {"x": rows(20).reshape(5, 4, 3)}, id="whole batches along an axis of their own"),
        pytest.param(WITH_TABLE, {"x": rows(5, 8), "table": rows(8, 2)}, id="an input that serves all batches"),
    ],
)
def test_the_total_announced_is_the_number_of_samples_that_come(text, data):
    feeds = read_data(data, load(model(text)))
    assert feeds.total == sum(batch.samples for batch in feeds.batches)


# ---- types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int32, bool])
def test_numbers_of_another_type_become_the_declared_one(dtype):
    x = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    given = fed(OPEN, {"x": x}, "x")
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_integer_inputs_take_smaller_integers(dtype):
    ids = np.arange(10, dtype=dtype).reshape(2, 5)
    given = fed(IDS, {"ids": ids}, "ids")
    assert given.dtype == np.int64
    np.testing.assert_array_equal(given, ids)


def test_fp16_inputs_take_fp32_data():
    x = rows(4)
    given = fed(HALF, {"x": x}, "x")
    assert given.dtype == np.float16
    np.testing.assert_array_equal(given, x.astype(np.float16))


@pytest.mark.parametrize(
    ("text", "data"),
    [
        pytest.param(HALF, {"x": np.full((2, 3), 1e6, np.float32)}, id="FP16"),
        pytest.param(OPEN, {"x": np.full((2, 3), 1e300)}, id="FP32"),
        pytest.param("g (int32[N] i) => (y) { y = Neg(i) }", {"i": np.array([2**40 + 1])}, id="INT32"),
    ],
)
def test_values_beyond_the_declared_type_are_refused(text, data):
    with pytest.raises(DataError):
        batches(text, data)


# ---- what does not fit -------------------------------------------------------------------------------------


def broken_at(index, value):
    x = rows(20)
    x[index, 1] = value
    return x


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        (OPEN, {"X_0": rows(4)}, "has no 'x'.*X_0.*the model's inputs are x"),
        (IDS_AND_MASK, {"ids": [[1] * 5], "maks": [[1.0] * 5]}, "has no 'mask'. Did you mean 'maks'"),
        (OPEN, {}, "has no 'x'"),
        (IDS, {"ids": np.ones((2, 5), np.float32)}, "holds float32, but the model wants int64"),
        (OPEN, {"x": np.ones((2, 3), complex)}, "complex128"),
        (OPEN, {"x": rows(4, 2)}, r"has shape \[4, 2\], but the model wants \[N, 3\]"),
        (OPEN, {"x": np.ones(3, np.float32)}, r"has shape \[3\], but the model wants \[N, 3\]"),
        (OPEN, {"x": rows(20, 2)}, r"has shape \[20, 2\], but the model wants \[N, 3\]"),
        (IMAGES, {"x": np.ones((16, 8, 8))}, r"has shape \[16, 8, 8\], but the model wants \[N, 16, 8, 8\]"),
        (OPEN, {"x": np.float32(1)}, "is a single number"),
        (BATCH_OF_4, {"x": rows(3)}, "has 3 samples, but the model's batch is 4"),
        (BATCH_OF_4, [{"x": rows(3)}], r"has shape \[3, 3\], but the model wants \[4, 3\]"),
        (OPEN, {"x": broken_at(0, np.nan)}, "NaN or infinity"),
        (OPEN, {"x": broken_at(19, -np.inf)}, "batch 3.*NaN or infinity"),
        (OPEN, {"x": rows(0)}, "'x' is empty"),
        (OPEN, [{"x": rows(2)}, {"x": rows(0)}], "batch 1: 'x' is empty"),
        (OPEN, {"x": np.array([[None, 1, 2]])}, "object"),
        (OPEN, {"x": [["a", "b", "c"]]}, "no number"),
        (OPEN, {"x": [[1.0], [1.0, 2.0]]}, "cannot be read as an array"),
        (IDS_AND_MASK, {"ids": np.ones((20, 5), int), "mask": rows(40, 5)}, "different numbers of samples.*20.*40"),
        (IDS_AND_MASK, {"ids": np.ones((20, 5), int), "mask": rows(24, 5)}, "different numbers of samples.*20.*24"),
        (IDS_AND_MASK, rows(4, 5), "one array, but the model has 2 inputs .ids, mask."),
        (OPEN, [7], "batch 0 is a int.*one mapping of input names to arrays"),
        (OPEN, 7, "a path, a mapping of arrays or an iterable of mappings"),
        (OPEN, "nowhere.npz", "nowhere.npz: no such data file"),
    ],
)
def test_data_that_do_not_fit_are_refused(text, data, message):
    with pytest.raises(DataError, match=message) as error:
        batches(text, data)
    assert "\n" not in str(error.value)


def truncated_npz(folder):
    whole = npz(folder, rows(50))
    whole.write_bytes(whole.read_bytes()[:-200])
    return whole


def truncated_npy(folder):
    whole = npy(folder, rows(50))
    whole.write_bytes(whole.read_bytes()[:-200])
    return whole


def empty_file(folder):
    (folder / "data.npz").touch()
    return folder / "data.npz"


def text_file(folder):
    (folder / "data.npz").write_text("x, y, z\n1, 2, 3\n")
    return folder / "data.npz"


def empty_folder(folder):
    return folder


def npz_with_objects(folder):
    np.savez(folder / "data.npz", x=np.array([[1, None, 3]], object))
    return folder / "data.npz"


def npz_of_another_model(folder):
    np.savez(folder / "data.npz", image=rows(4))
    return folder / "data.npz"


def broken_test_set(folder):
    saved_test_sets(folder, [{"x": rows(1)}])
    (folder / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff" * 9)
    return folder


def folder_without_inputs(folder):
    (folder / "test_data_set_0").mkdir()
    return folder


BROKEN = [
    truncated_npz, truncated_npy, empty_file, text_file, empty_folder, npz_with_objects, npz_of_another_model,
    broken_test_set, folder_without_inputs,
]  # fmt: skip


@pytest.mark.parametrize("source", BROKEN)
def test_broken_files_are_refused_by_name_and_closed_again(source, tmp_path):
    with pytest.raises(DataError) as error:
        batches(OPEN, source(tmp_path))
    message = str(error.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    del error
    gc.collect()  # a file that was left open warns here, and warnings are errors


def test_an_npz_may_hold_objects_that_are_no_inputs(tmp_path):
    x = rows(4)
    np.savez(tmp_path / "data.npz", x=x, names=np.array(["a.png", None], object))
    np.testing.assert_array_equal(fed(OPEN, tmp_path / "data.npz", "x"), x)


def test_an_npy_for_a_model_with_two_inputs_is_refused(tmp_path):
    with pytest.raises(DataError, match="the model has 2 inputs"):
        batches(IDS_AND_MASK, npy(tmp_path, rows(4, 5)))


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_pickled_code_is_never_run(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    bombs = np.array([Bomb()], object)
    if name.endswith(".npz"):
        np.savez(tmp_path / name, x=bombs)
    else:
        np.save(tmp_path / name, bombs)
    with pytest.raises(DataError):
        batches(OPEN, tmp_path / name)
    assert not (tmp_path / "ran").exists()


CONTAINERS = "g (float[N,3] x, seq(float[A,3]) s, optional(float[3]) o) => (x) { h = OptionalHasElement(o) }"


def test_a_sequence_is_a_list_and_what_is_not_there_is_none():
    x, one, two = rows(4), rows(1), rows(2)
    (batch,) = read_data([{"x": x, "s": (one, two), "o": None}], load(model(CONTAINERS, 18))).batches
    assert [array.shape for array in batch.feed["s"]] == [(1, 3), (2, 3)]
    assert batch.feed["o"] is None
    assert (batch.samples, batch.divisible, batch.nbytes) == (1, False, 4 * 3 * (4 + 1 + 2))
    assert batch.shapes == {"x": (4, 3)}


def test_copies_and_fingerprints_reach_into_sequences():
    (batch,) = read_data([{"x": rows(4), "s": [rows(1)], "o": rows(1)[0]}], load(model(CONTAINERS, 18))).batches
    copy, before = batch.copied(), fingerprint(batch)
    batch.feed["s"][0][:] = 7
    assert fingerprint(copy) == before != fingerprint(batch)
    assert fingerprint(replace(copy, feed=copy.feed | {"o": None})) != before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s": rows(1)}, "batch 0: 's' is a sequence, and got a ndarray: give a list"),
        ({"s": [rows(1, 4)]}, r"batch 0: 's' has shape \[1, 4\], but the model wants \[A, 3\]"),
        ({"s": [np.full((1, 3), np.nan, np.float32)]}, "batch 0: 's' holds NaN"),
        ({"o": rows(1)}, r"batch 0: 'o' has shape \[1, 3\], but the model wants \[3\]"),
        ({"x": None}, "batch 0: 'x' holds object, which is no number"),
    ],
)
def test_what_is_no_such_sequence_or_tensor_is_refused(change, reason):
    feed = {"x": rows(4), "s": [rows(1)], "o": None} | change
    with pytest.raises(DataError, match=reason):
        list(read_data([feed], load(model(CONTAINERS, 18))).batches)


def test_arrays_and_files_feed_tensors_alone(tmp_path):
    np.savez(tmp_path / "data.npz", x=rows(4))
    for data in ({"x": rows(4)}, rows(4), tmp_path / "data.npz", tmp_path):
        with pytest.raises(DataError, match="'s' is a sequence: give one mapping per sample, with a list of arrays"):
            read_data(data, load(model(CONTAINERS, 18)))
    with pytest.raises(DataError, match="'s' is a sequence"):
        default_data(load(model(CONTAINERS, 18)))


def test_a_script_feeds_sequences(tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(
        "import numpy as np\n"
        "def load_data():\n"
        "    x = np.ones((4, 3), np.float32)\n"
        "    yield {'x': x, 's': [x, x[:1]], 'o': None}\n"
    )
    (batch,) = read_data(script, load(model(CONTAINERS, 18))).batches
    assert len(batch.feed["s"]) == 2


# ---- what goes to calibration, and what to the comparison --------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5, 8, 13, 20])
def test_an_open_batch_is_cut_to_the_limit_exactly(limit):
    x = rows(20)
    split, used = dealt(OPEN, {"x": x}, limit)
    assert split.samples == limit
    np.testing.assert_array_equal(used, x[:limit])


def test_a_limit_above_the_number_of_samples_uses_all():
    split, used = dealt(OPEN, {"x": rows(20)}, 100)
    assert (split.samples, len(used), split.held_out) == (20, 20, False)


def test_fixed_batches_do_not_exceed_the_limit():
    split, _ = dealt(BATCH_OF_4, {"x": rows(20)}, 6)
    assert split.samples == 4


def test_what_lies_behind_the_limit_is_for_the_comparison():
    x = rows(40)
    split, _ = dealt(OPEN, {"x": x}, 8)
    assert split.held_out
    np.testing.assert_array_equal(evaluated(split), x[8:])


def test_every_fourth_batch_is_held_out():
    x = rows(32)
    split, used = dealt(BATCH_OF_1, {"x": x})
    fourth = np.arange(32) % 4 == 3
    assert (split.samples, split.held_out) == (24, True)
    np.testing.assert_array_equal(used, x[~fourth])
    np.testing.assert_array_equal(evaluated(split), x[fourth])


def test_nothing_is_held_out_of_fewer_than_sixteen_samples():
    x = rows(15)
    split, used = dealt(BATCH_OF_1, {"x": x})
    assert (split.samples, split.held_out) == (15, False)
    np.testing.assert_array_equal(np.sort(used, 0), np.sort(x, 0))
    np.testing.assert_array_equal(np.sort(evaluated(split), 0), np.sort(x, 0))


def test_nothing_is_held_out_where_nobody_compares():
    split, used = dealt(BATCH_OF_1, {"x": rows(32)}, hold_out=False)
    assert (split.samples, len(used), split.held_out) == (32, 32, False)


def test_a_generator_is_read_once_and_serves_both():
    x = rows(16)
    split, used = dealt(OPEN, ({"x": x[i : i + 1]} for i in range(16)))
    assert (len(used), len(evaluated(split))) == (12, 4)


def test_an_endless_stream_is_read_only_as_far_as_needed():
    taken = itertools.count()
    split, _ = dealt(OPEN, ({"x": np.full((1, 3), next(taken), np.float32)} for _ in itertools.count()), 10)
    assert split.samples == 10
    assert next(taken) < 1000


def test_a_buffer_that_is_filled_anew_for_every_batch_gives_every_batch_to_the_comparison():
    x = rows(16)

    def refilled():
        buffer = np.empty((1, 3), np.float32)
        for row in x:
            buffer[:] = row
            yield {"x": buffer}

    split = Split(read_data(refilled(), load(model(OPEN))))
    np.testing.assert_array_equal(np.concatenate([batch.feed["x"].copy() for batch in split]), x[np.arange(16) % 4 < 3])
    np.testing.assert_array_equal(evaluated(split), x[3::4])


@pytest.mark.parametrize("samples", [16, 20, 24])
def test_a_fourth_of_a_small_set_with_an_open_batch_is_held_out(samples):
    x = rows(samples)
    split, used = dealt(OPEN, {"x": x})
    assert split.held_out
    np.testing.assert_array_equal(used, x[: samples * 3 // 4])
    np.testing.assert_array_equal(evaluated(split), x[samples * 3 // 4 :])


def test_no_samples_at_all_are_refused():
    with pytest.raises(DataError, match="no samples"):
        dealt(OPEN, [])


def test_a_limit_of_no_samples_is_refused():
    with pytest.raises(DataError, match="give at least one"):
        dealt(OPEN, {"x": rows(4)}, 0)


# ---- made-up inputs ---------------------------------------------------------------------------------------------


def test_made_up_inputs_are_the_same_every_time():
    first, second = (made_up(OPEN, {"x": (2, 3)}) for _ in range(2))
    np.testing.assert_array_equal(first["x"], second["x"])


def test_made_up_floats_are_about_standard_normal_and_integers_are_0_and_1():
    feed = made_up(IDS_AND_MASK, {"ids": (200, 5), "mask": (200, 5)})
    assert set(np.unique(feed["ids"])) == {0, 1}
    assert abs(feed["mask"].mean()) < 0.2
    assert abs(feed["mask"].std() - 1) < 0.2


def test_an_open_batch_becomes_one_and_other_open_sizes_the_first_that_runs():
    text = "g (float[N,C,L] x) => (y) { y = Relu(x) }"
    tried = []

    def refused(feed):
        tried.append(feed["x"].shape)
        return None if feed["x"].shape == (1, 64, 64) else "too large"

    feeds = default_data(load(model(text)), None, refused)
    assert feeds.synthetic
    assert next(feeds.batches).feed["x"].shape == (1, 64, 64)
    assert tried == [(1, 224, 224), (1, 512, 512), (1, 64, 64)]


def test_a_model_that_runs_with_no_size_asks_for_shapes():
    with pytest.raises(DataError, match="--shapes"):
        next(default_data(load(model(OPEN)), None, lambda feed: "no size is right").batches)


def test_stated_shapes_that_do_not_run_are_refused_with_the_reason():
    with pytest.raises(DataError, match=r"x \[2, 3\].*an odd batch is wanted"):
        next(default_data(load(model(OPEN)), {"x": (2, 3)}, lambda feed: "an odd batch is wanted").batches)


def test_sizes_that_the_model_states_itself_are_tried_once_and_the_reason_is_given():
    tried = []
    with pytest.raises(DataError, match=r"does not run on inputs of these sizes \(x \[1, 3\]\): too small"):
        next(default_data(load(model(BATCH_OF_1)), None, lambda feed: tried.append(feed) or "too small").batches)
    assert len(tried) == 1


def test_shapes_of_an_unknown_input_are_refused_with_the_nearest_name():
    text = "g (float[N,3] pixels) => (y) { y = Relu(pixels) }"
    with pytest.raises(DataError, match=r"no input 'pixel'\. Did you mean 'pixels'"):
        next(default_data(load(model(text)), {"pixel": (1, 3)}).batches)


# ---- helpers -----------------------------------------------------------------------------------------------


def shapes(text, data):
    return [batch.feed["x"].shape for batch in batches(text, data)]


def dealt(text, data, limit=None, hold_out=True):
    """The split, and what calibration used of input x."""
    split = Split(read_data(data, load(model(text))), limit, hold_out)
    return split, np.concatenate([batch.feed["x"] for batch in split])


def evaluated(split):
    return np.concatenate([batch.feed["x"] for batch in split.for_comparison()])


def made_up(text, given):
    return next(default_data(load(model(text)), given).batches).feed


def saved_test_sets(folder, feeds):
    for index, feed in enumerate(feeds):
        one = folder / f"test_data_set_{index}"
        one.mkdir()
        for slot, (name, array) in enumerate(feed.items()):
            onnx.save_tensor(numpy_helper.from_array(array, name), one / f"input_{slot}.pb")
    return folder


def encode(array):
    """As Polygraphy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}
