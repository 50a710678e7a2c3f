"""Arrays in files are read a few rows at a time; a file that breaks is named in one sentence."""

import gc
import io
import tracemalloc
import zipfile

import numpy as np
import onnx
import pytest

from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.errors import DataError
from qdq_surgeon.model import load
from tests.calibration.feeding import IDS_AND_MASK, OPEN, batches, fed, opened, rows
from tests.graphs import model

WIDE = "g (float[N,4096] x) => (y) { y = Relu(x) }"
MEGABYTE = 1 << 20


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content if isinstance(content, bytes | str) else npy_bytes(content))
    return path


def with_broken_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    return path


# ---- memory stays flat -------------------------------------------------------------------------------------


def saved(folder, x):
    np.savez(folder / "x.npz", x=x)
    return folder / "x.npz"


def compressed(folder, x):
    np.savez_compressed(folder / "x.npz", x=x)
    return folder / "x.npz"


def mapped(folder, x):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def mapped_by_the_caller(folder, x):
    return {"x": np.load(mapped(folder, x), mmap_mode="r")}


def mapped_in_another_byte_order(folder, x):
    return {"x": np.load(mapped(folder, x.astype(">f4")), mmap_mode="r")}


def in_a_folder(folder, x):
    for index, part in enumerate(np.split(x, 4)):
        np.savez(folder / f"{index}.npz", x=part)
    return folder


@pytest.mark.parametrize(
    "source", [saved, compressed, mapped, mapped_by_the_caller, mapped_in_another_byte_order, in_a_folder]
)
def test_no_more_than_the_batch_in_hand_is_in_memory(source, tmp_path):
    x = np.zeros((4096, 4096), np.float32)
    data = source(tmp_path, x)
    del x
    tracemalloc.start()
    samples = sum(batch.samples for batch in opened(WIDE, data).batches)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples == 4096
    assert peak < 4 * MEGABYTE  # of 64


def test_a_mapped_array_given_by_the_caller_is_not_copied(tmp_path):
    x = np.load(mapped(tmp_path, rows(20)), mmap_mode="r")
    (first, *_) = batches(OPEN, x)
    assert np.shares_memory(first.feed["x"], x)


# ---- what an archive may hold ------------------------------------------------------------------------------


def test_an_archive_may_hold_members_that_are_no_inputs(tmp_path):
    members = {"README.txt": "about", "__MACOSX/._x.npy": b"junk", "labels.npy": np.arange(4), "x.npy": rows(4)}
    np.testing.assert_array_equal(fed(OPEN, archive(tmp_path / "x.npz", members), "x"), rows(4))


def test_inputs_are_matched_by_name_in_any_order(tmp_path):
    path = archive(tmp_path / "x.npz", {"mask.npy": rows(20, 5), "ids.npy": np.arange(100).reshape(20, 5)})
    np.testing.assert_array_equal(fed(IDS_AND_MASK, path, "ids"), np.arange(100).reshape(20, 5))
    np.testing.assert_array_equal(fed(IDS_AND_MASK, path, "mask"), rows(20, 5))


@pytest.mark.parametrize("name", ["größe", "入力", "serving/x:0", "x.npy", "a b"])
def test_an_input_may_have_any_name(name, tmp_path):
    proto = model(OPEN)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = name
    np.savez(tmp_path / "x.npz", **{name: rows(4)})
    (batch,) = read_data(tmp_path / "x.npz", load(proto)).batches
    np.testing.assert_array_equal(batch.feed[name], rows(4))


def test_an_array_in_fortran_order_is_read_too(tmp_path):
    x = np.asfortranarray(rows(20))
    np.testing.assert_array_equal(fed(OPEN, saved(tmp_path, x), "x"), x)
    np.testing.assert_array_equal(fed(OPEN, mapped(tmp_path, x), "x"), x)


def test_a_single_number_is_read_from_an_archive(tmp_path):
    text = "g (float[N,3] x, float k) => (y) { y = Mul(x, k) }"
    np.savez(tmp_path / "x.npz", x=rows(9), k=np.float32(2))
    assert [float(batch.feed["k"]) for batch in batches(text, tmp_path / "x.npz")] == [2, 2]


def test_a_dimension_of_none_behind_the_samples_is_no_lack_of_data(tmp_path):
    """A decoder's first step has an empty past."""
    text = "g (float[N,3] x, float[N,P,2] past) => (y, z) { y = Relu(x)\n z = Relu(past) }"
    np.savez(tmp_path / "x.npz", x=rows(9), past=np.zeros((9, 0, 2), np.float32))
    assert [batch.feed["past"].shape for batch in batches(text, tmp_path / "x.npz")] == [(8, 0, 2), (1, 0, 2)]


def test_headers_of_version_2_are_read(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array(file, rows(4), version=(2, 0))
    np.testing.assert_array_equal(fed(OPEN, archive(tmp_path / "x.npz", {"x.npy": file.getvalue()}), "x"), rows(4))


def test_files_are_closed_when_a_reader_stops_half_way(tmp_path):
    feeds = opened(OPEN, saved(tmp_path, rows(40)))
    next(feeds.batches)
    del feeds
    gc.collect()  # a file that was left open warns here, and warnings are errors


# ---- what is refused ---------------------------------------------------------------------------------------


def refused(data, text=OPEN):
    with pytest.raises(DataError) as error:
        batches(text, data)
    message = str(error.value)
    assert str(data) in message
    assert "\n" not in message
    return message


def test_an_empty_archive_has_no_inputs(tmp_path):
    assert "has no 'x'. It has nothing" in refused(archive(tmp_path / "x.npz", {}))


def test_an_archive_without_rows_is_empty(tmp_path):
    assert "'x' is empty" in refused(saved(tmp_path, rows(0)))
    assert "'x' is empty" in refused(mapped(tmp_path, rows(0)))


def test_inputs_of_different_lengths_are_refused(tmp_path):
    path = archive(tmp_path / "x.npz", {"ids.npy": np.ones((20, 5), int), "mask.npy": rows(24, 5)})
    assert "different numbers of samples (ids 20, mask 24)" in refused(path, IDS_AND_MASK)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([["a", "b", "c"]]), "no number"),
        (np.array([["2026-01-01"] * 3], "datetime64[D]"), "no number"),
        (np.ones((2, 3), complex), "holds complex128"),
        (np.ones((2, 3), [("real", "f4")]), "but the model wants float32"),
    ],
)
def test_what_is_no_number_is_refused_before_it_is_read(array, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened(OPEN, saved(tmp_path, array))


def test_objects_are_refused_by_their_header(tmp_path):
    ragged = np.array([np.ones(3), np.ones(4)], object)
    assert "Python objects, which are never loaded" in refused(saved(tmp_path, ragged))
    assert "Python objects, which are never loaded" in refused(mapped(tmp_path, ragged))


def test_an_array_that_promises_more_rows_than_it_has_is_refused_at_once(tmp_path):
    short = npy_bytes(rows(40))[:-12]
    with pytest.raises(DataError, match="an array ends early"):
        opened(OPEN, archive(tmp_path / "x.npz", {"x.npy": short}))
    (tmp_path / "x.npy").write_bytes(short)
    with pytest.raises(DataError, match="an array ends early"):
        opened(OPEN, tmp_path / "x.npy")


def test_a_header_that_promises_a_negative_number_of_rows_is_refused(tmp_path):
    content = npy_bytes(rows(40)).replace(b"(40, 3)", b"(-4, 3)")
    assert "ends early" in refused(archive(tmp_path / "x.npz", {"x.npy": content}))


def test_a_header_that_promises_a_huge_array_costs_no_memory(tmp_path):
    content = npy_bytes(rows(40)).replace(b"(40, 3), }" + b" " * 12, b"(4000000000000, 3), } ")
    assert "ends early" in refused(archive(tmp_path / "x.npz", {"x.npy": content}))


def test_a_member_that_is_no_array_is_refused(tmp_path):
    assert "not a whole .npz or .npy file" in refused(archive(tmp_path / "x.npz", {"x.npy": "text", "y.npy": rows(2)}))


@pytest.mark.parametrize("save", [saved, compressed])
def test_an_archive_that_is_broken_in_the_middle_gives_the_batches_before_and_then_says_so(save, tmp_path):
    path = save(tmp_path, rows(4096))
    with_broken_byte(path, path.stat().st_size // 2)
    given = opened(OPEN, path).batches
    assert next(given).samples == 8
    with pytest.raises(DataError, match=r"x\.npz is not a whole .npz or .npy file \(") as error:
        list(given)
    assert "\n" not in str(error.value)
    del error
    gc.collect()


def test_a_file_that_disappears_in_the_middle_is_named(tmp_path):
    np.save(tmp_path / "x.npy", rows(20))
    given = opened(OPEN, tmp_path / "x.npy").batches
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match=r"x\.npy is not a whole"):
        next(given)


def test_a_compression_that_python_does_not_know_is_refused(tmp_path):
    path = saved(tmp_path, rows(40))
    content = path.read_bytes()
    directory = content.rindex(b"PK\x01\x02")
    path.write_bytes(content[: directory + 10] + b"\x63\x00" + content[directory + 12 :])
    assert "not a whole .npz" in refused(path)


def test_a_broken_model_of_the_archive_is_not_mistaken_for_data(tmp_path):
    onnx.save(model(OPEN), tmp_path / "model.onnx")
    assert "not a whole .npz or .npy file" in refused(tmp_path / "model.onnx")
