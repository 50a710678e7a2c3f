"""Calibration caches against lines that TensorRT wrote and against Model-Optimizer's way to read them."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.errors import DataError, ModelError, PlanError
from qdq_surgeon.tensorrt.cache import read_cache, scales_from_cache, write_cache
from tests.graphs import model

FROM_TENSORRT = """TRT-8401-EntropyCalibration2
input: 3caa54fc
onnx::Conv_329: 3c96d93c
(Unnamed Layer* 64) [Shuffle]_output: 0
a: b c: 3d1f5c19
"""

TWO_CONVS = """g (float[N,16,8,8] x) => (z) <float[16,16,3,3] w, float[16,16,3,3] v> {
    y = Conv<pads=[1,1,1,1]>(x, w)
    z = Conv<pads=[1,1,1,1]>(y, v)
}"""

MOVED = """g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w> {
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    y = Conv(p, w)
}"""

CONCAT = """g (float[N,16,8,8] a, float[N,16,8,8] b) => (z) <float[16,32,3,3] w> {
    y = Concat<axis=1>(a, b)
    z = Conv(y, w)
}"""


# ---- reading -----------------------------------------------------------------------------------------------


def test_a_cache_that_tensorrt_wrote(tmp_path):
    cache = read_cache(written(tmp_path, FROM_TENSORRT))
    assert cache.header == "TRT-8401-EntropyCalibration2"
    assert dict(cache) == {
        "input": bits(0x3CAA54FC),
        "onnx::Conv_329": bits(0x3C96D93C),
        "(Unnamed Layer* 64) [Shuffle]_output": 0.0,
        "a: b c": bits(0x3D1F5C19),
    }


def test_the_origin_names_the_file_and_its_digest(tmp_path):
    path = written(tmp_path, FROM_TENSORRT)
    origin = read_cache(path).origin
    assert (origin.data, origin.samples) == (str(path), 0)
    assert origin.digest == hashlib.sha256(FROM_TENSORRT.encode()).hexdigest()


def test_windows_line_ends_and_empty_lines_are_read(tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"TRT-8601-MinMaxCalibration\r\nx: 3f800000\r\n\r\n")
    assert dict(read_cache(path)) == {"x": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a TensorRT calibration cache begins with"),
        ("x: 3f800000\n", "line 1: a TensorRT calibration cache begins with"),
        ("TRT-8601-EntropyCalibration2\nx 3f800000\n", "line 2: expected 'tensor: 3c010a14'"),
        ("TRT-8601-EntropyCalibration2\nx: 0.25\n", "line 2: expected 'tensor: 3c010a14'"),
        ("TRT-8601-EntropyCalibration2\nx: 3f8000001\n", "line 2: expected 'tensor: 3c010a14'"),
        ("TRT-8601-EntropyCalibration2\n\nx: 7fc00000\n", "line 3: the scale of 'x' is nan"),
        ("TRT-8601-EntropyCalibration2\nx: 7f800000\n", "line 2: the scale of 'x' is inf"),
        ("TRT-8601-EntropyCalibration2\nx: bf800000\n", "line 2: the scale of 'x' is -1"),
        ("TRT-8601-EntropyCalibration2\nx: 3f800000\nx: 3f000000\n", "line 3: a second scale for 'x'"),
    ],
)
def test_what_is_no_cache_is_refused_with_file_and_line(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=f"^{path}, {message}"):
        read_cache(path)


def test_a_file_that_is_missing_or_binary_is_refused(tmp_path):
    with pytest.raises(DataError, match="missing cannot be read: No such file"):
        read_cache(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"TRT-\xff\xfe")
    with pytest.raises(DataError, match="is not text"):
        read_cache(tmp_path / "binary")


# ---- writing -----------------------------------------------------------------------------------------------


def test_what_was_written_is_read_by_model_optimizers_rule(tmp_path):
    """Its rule: skip a line, split at ': ', unpack '!f' from the hex bytes."""
    proto = model(TWO_CONVS)
    plan, scales = calibrated(proto)
    write_cache(scales, plan, tmp_path / "cache")
    header, *lines = (tmp_path / "cache").read_text().splitlines()
    assert header == "TRT-8601-EntropyCalibration2"
    entries = dict(line.split(": ") for line in lines)
    read = {name: struct.unpack("!f", bytes.fromhex(digits))[0] for name, digits in entries.items()}
    assert read == {"x": scales.values["x", None], "y": scales.values["y", None]}


def test_the_source_of_moved_values_is_written_too(tmp_path):
    proto = model(MOVED)
    plan, scales = calibrated(proto)
    write_cache(scales, plan, tmp_path / "cache")
    cache = read_cache(tmp_path / "cache")
    assert cache["x"] == cache["p"] > 0


def test_the_header_is_for_the_caller_to_choose(tmp_path):
    plan, scales = calibrated(model(TWO_CONVS))
    write_cache(scales, plan, tmp_path / "cache", "TRT-101401-EntropyCalibration2")
    assert read_cache(tmp_path / "cache").header == "TRT-101401-EntropyCalibration2"


def test_a_folder_that_refuses_leaves_nothing_behind(tmp_path):
    plan, scales = calibrated(model(TWO_CONVS))
    with pytest.raises(ModelError, match="cannot be written"):
        write_cache(scales, plan, tmp_path / "nowhere" / "cache")
    assert not list(tmp_path.iterdir())


# ---- scales ------------------------------------------------------------------------------------------------


def test_activations_take_the_scales_of_the_cache_bit_for_bit_and_weights_their_own(tmp_path):
    proto = model(TWO_CONVS)
    cache = read_cache(written(tmp_path, "TRT-8601-EntropyCalibration2\nx: 3caa54fc\ny: 3c96d93c\n"))
    plan, calibration = calibrated(proto)
    scales = scales_from_cache(qdq_surgeon.load(proto), plan, cache)
    assert scales.values["x", None] == np.float32(bits(0x3CAA54FC))
    assert scales.values["y", None] == np.float32(bits(0x3C96D93C))
    np.testing.assert_array_equal(scales.values["w", 0], calibration.values["w", 0])
    assert (scales.method, scales.origin, scales.dropped) == ("cache", cache.origin, {})


def test_a_cache_that_we_wrote_gives_the_same_model_again(tmp_path):
    proto = model(CONCAT)
    plan, scales = calibrated(proto)
    write_cache(scales, plan, tmp_path / "cache")
    again = scales_from_cache(qdq_surgeon.load(proto), plan, read_cache(tmp_path / "cache"))
    assert again.values.keys() == scales.values.keys()
    assert all((again.values[key] == scales.values[key]).all() for key in scales.values)


def test_a_tensor_that_is_missing_takes_the_scale_of_its_source():
    _, scales = from_cache(MOVED, {"x": 0.5})
    assert scales.values["p", None] == 0.5
    assert not scales.dropped


def test_a_known_range_stands_in_for_a_scale_that_is_missing():
    proto = model(TWO_CONVS)
    plan = qdq_surgeon.plan(proto)
    sites = tuple(replace(site, range=(-1.0, 2.0)) if site.tensor == "y" else site for site in plan.sites)
    scales = scales_from_cache(qdq_surgeon.load(proto), replace(plan, sites=sites), {"x": 0.5})
    assert scales.values["y", None] == np.float32(2 / 127)


@pytest.mark.parametrize("cache", [{"x": 0.5}, {"x": 0.5, "y": 0.0}])
def test_an_op_without_a_scale_goes_back_to_float_as_a_whole(cache):
    proto = model(TWO_CONVS)
    plan, scales = from_cache(TWO_CONVS, cache)
    assert {(edge.reader, edge.slot) for edge in scales.dropped} == {("z", 0), ("z", 1)}
    assert set(scales.dropped.values()) == {"the calibration cache has no scale for 'y'"}
    quantized = qdq_surgeon.insert(proto, plan, scales)
    inputs = {node.output[0]: list(node.input) for node in quantized.graph.node if node.op_type == "Conv"}
    assert inputs == {"y": ["x_dequantized", "w_dequantized"], "z": ["y", "v"]}


def test_a_concat_whose_scales_lie_too_far_apart_goes_back_to_float():
    _, scales = from_cache(CONCAT, {"a": 0.5, "b": 0.5e-3, "y": 0.5})
    assert {edge.reader for edge in scales.dropped} == {"y"}


def test_a_concat_takes_the_largest_scale():
    _, scales = from_cache(CONCAT, {"a": 0.5, "b": 0.25, "y": 0.5})
    assert {float(scales.values[name, None]) for name in "aby"} == {0.5}


def test_a_cache_of_another_model_is_refused_with_near_names():
    with pytest.raises(DataError, match=r"none of the 2 activations .*another model. Did you mean 'x1'\?"):
        from_cache(TWO_CONVS, {"x1": 0.5, "unrelated": 0.5})


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(PlanError):
        scales_from_cache(qdq_surgeon.load(model(CONCAT)), qdq_surgeon.plan(model(TWO_CONVS)), {"x": 0.5})


# ---- helpers -----------------------------------------------------------------------------------------------


def written(folder, text):
    path = folder / "calibration.cache"
    path.write_text(text)
    return path


def bits(number: int) -> float:
    """The float32 with these bits, by NumPy."""
    return float(np.asarray(number, np.uint32).view(np.float32))


def calibrated(proto):
    result = qdq_surgeon.quantize(proto, samples=2, compare=False)
    return result.plan, result.scales


def from_cache(text, cache):
    proto = model(text)
    plan = qdq_surgeon.plan(proto)
    return plan, scales_from_cache(qdq_surgeon.load(proto), plan, cache)
