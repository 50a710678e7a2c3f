"""Model files: weights that stay in a file of their own, and what is written is whole."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

import qdq_surgeon
from qdq_surgeon import storage, weights
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.cli import insert_main, main
from qdq_surgeon.errors import ModelError
from qdq_surgeon.model import load
from tests.graphs import model

TWO_WEIGHTS = """g (float[N,64] x) => (float[N,64] y) <float[64,64] w, float[64,64] v, int64[2] s = {-1, 64}> {
    m = MatMul(x, w)
    r = Reshape(m, s)
    t = Transpose<perm=[1,0]>(v)
    y = MatMul(r, t)
}"""


@pytest.fixture
def apart(tmp_path) -> Path:
    """A model whose tensors, small ones too, lie in a file beside it."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(model(TWO_WEIGHTS), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)


def weight(proto: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def values(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# ---- reading ------------------------------------------------------------------------------------------------------


def test_large_weights_stay_in_their_file_and_small_ones_are_read(apart):
    proto = load(apart).proto
    assert {tensor.name: weights.is_outside(tensor) for tensor in proto.graph.initializer} == {
        "w": True,
        "v": True,
        "s": False,
    }


def test_values_are_mapped_one_tensor_at_a_time(apart):
    value = load(apart).graph.value("w")
    np.testing.assert_array_equal(value, values(model(TWO_WEIGHTS))["w"])
    assert not value.flags.owndata
    assert not value.flags.writeable


def test_constants_made_from_weights_outside_are_computed(apart):
    np.testing.assert_array_equal(load(apart).graph.value("t"), values(model(TWO_WEIGHTS))["v"].T)


def test_the_digest_and_the_plan_do_not_depend_on_where_weights_lie(apart):
    outside, inside = load(apart), load(model(TWO_WEIGHTS))
    assert outside.digest == inside.digest
    assert str(qdq_surgeon.plan(outside)) == str(qdq_surgeon.plan(inside))


def test_the_digest_covers_weights_outside(apart):
    before = load(apart).digest
    with apart.with_name("weights.bin").open("r+b") as file:
        file.write(b"\x01")
    assert load(apart).digest != before


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "bool", "complex64"])
def test_every_type_that_numpy_maps_is_read(dtype, tmp_path):
    value = np.arange(10_000).reshape(100, 100).astype(dtype)
    assert_same(read_outside(numpy_helper.from_array(value, "w"), tmp_path), value)


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4"])
def test_every_type_that_numpy_does_not_map_is_read(kind, tmp_path):
    tensor = onnx.helper.make_tensor("w", getattr(TensorProto, kind), [100, 200], np.arange(20_000) % 7)
    assert_same(read_outside(tensor, tmp_path), numpy_helper.to_array(tensor))


def read_outside(tensor: TensorProto, folder: Path) -> np.ndarray:
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    proto.graph.output.add().name = "w"
    storage.save(proto, folder / "model.onnx", external_data=True)
    (read,) = storage.read_model(folder / "model.onnx").graph.initializer
    assert weights.is_outside(read)
    return weights.array(read)


def assert_same(left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def test_old_opsets_and_ir_versions_are_raised_without_reading_the_weights(tmp_path):
    proto = model("g (float[N,64] x) => (float[N,64] y) <float[64,64] w> { m = MatMul(x, w) y = Softmax(m) }", opset=11)
    proto.ir_version = 3
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 64]))
    path = tmp_path / "old.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin")
    loaded = load(path)
    assert (loaded.opset, loaded.proto.ir_version) == (13, 4)
    assert weights.is_outside(loaded.proto.graph.initializer[0])
    assert qdq_surgeon.plan(loaded).sites


def test_a_model_in_memory_may_not_point_to_files(apart):
    """A ModelProto of unknown origin could ask for any file of the machine."""
    proto = model(TWO_WEIGHTS)
    weights.refer(weight(proto, "w"), "passwd", 0, 16384, Path("/etc"))
    with pytest.raises(ModelError, match="values of 'w' cannot be read: load the model with its external data"):
        load(proto).graph.value("w")


# ---- running ------------------------------------------------------------------------------------------------------


def test_the_whole_line_runs_on_weights_outside_as_on_those_inside(apart):
    outside, inside = (qdq_surgeon.quantize(source, {"x": images()}) for source in (apart, model(TWO_WEIGHTS)))
    qdq_surgeon.save(outside.model, apart.with_name("out.onnx"))
    assert values(onnx.load(apart.with_name("out.onnx"))).keys() == values(inside.model).keys()
    for name, value in values(onnx.load(apart.with_name("out.onnx"))).items():
        np.testing.assert_array_equal(value, values(inside.model)[name])
    assert outside.comparison.sqnr == pytest.approx(inside.comparison.sqnr, abs=0.1)


@pytest.mark.parametrize("options", [{"float16": True}, {"memory": 1 << 20}, {"method": "max"}])
def test_the_options_work_on_weights_outside(options, apart):
    result = qdq_surgeon.quantize(apart, {"x": images()}, **options)
    assert result.comparison.sqnr > 20


def test_where_files_cannot_be_linked_they_are_copied(apart, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    assert Session(load(apart).proto).outputs == ("y",)


def test_a_folder_without_room_for_a_copy_is_one_line(apart, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ModelError, match="set TMPDIR to a folder on the model's disk"):
        Session(load(apart).proto)


def test_a_model_in_memory_that_is_too_big_for_one_file_runs(monkeypatch):
    monkeypatch.setattr(storage, "LIMIT", 10_000)
    result = qdq_surgeon.quantize(model(TWO_WEIGHTS), {"x": images()})
    assert result.comparison.sqnr > 20


# ---- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["inside", "outside"])
def test_weights_go_into_a_file_beside_the_model(source, apart, tmp_path):
    proto = load(apart).proto if source == "outside" else model(TWO_WEIGHTS)
    storage.save(proto, tmp_path / "out.onnx", external_data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.onnx", "out.onnx.data"]
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    for name, value in values(onnx.load(tmp_path / "out.onnx")).items():
        np.testing.assert_array_equal(value, values(model(TWO_WEIGHTS))[name])
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": images()})[0].shape == (20, 64)


def test_one_file_holds_what_fits_and_an_unnamed_folder_is_never_in_it(apart, tmp_path):
    storage.save(load(apart).proto, tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert not any(tensor.external_data for tensor in written.graph.initializer)
    storage.save(load(apart).proto, tmp_path / "out.onnx", external_data=True)
    assert str(tmp_path).encode() not in (tmp_path / "out.onnx").read_bytes()


def test_what_exceeds_one_file_gets_a_second_one(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LIMIT", 10_000)
    storage.save(model(TWO_WEIGHTS), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    with pytest.raises(ModelError, match=r"exceeds 2 GB, which one ONNX file cannot hold: allow external data"):
        storage.save(model(TWO_WEIGHTS), tmp_path / "other.onnx", external_data=False)


def test_everything_but_the_weights_stays_as_it_was(tmp_path):
    proto = model(TWO_WEIGHTS)
    proto.doc_string, proto.domain, proto.producer_name = "a", "b", "c"
    proto.metadata_props.add(key="k", value="v")
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    weight(proto, "w").doc_string = "d"
    storage.save(proto, tmp_path / "out.onnx", external_data=True)
    written = onnx.load(tmp_path / "out.onnx")
    for tensor in written.graph.initializer:
        tensor.ClearField("data_location")
    assert written == proto


@pytest.mark.parametrize("output", ["weights.bin", "out.onnx"])
def test_the_weights_of_the_input_are_never_overwritten(output, apart):
    proto = load(apart).proto
    if output == "out.onnx":
        os.link(apart.with_name("weights.bin"), apart.with_name("out.onnx.data"))
    with pytest.raises(ModelError, match="holds the weights of the input, which is never overwritten"):
        storage.save(proto, apart.with_name(output), external_data=True)


@pytest.mark.parametrize(
    ("lie_in", "command"),
    [
        ("out.onnx.data", "insert int8.onnx --requantize --external-data -o out.onnx"),
        ("out.onnx.data", "insert int8.onnx --simplify --requantize --external-data -o out.onnx"),
        ("out.onnx", "strip int8.onnx -o out.onnx"),
        ("out.onnx", "lint int8.onnx --fix out.onnx"),
        ("plan.json", "plan int8.onnx --json plan.json"),
        ("stats.npz", "calibrate int8.onnx -o stats.npz"),
        ("report.json", "compare int8.onnx int8.onnx --json report.json"),
    ],
)
def test_no_output_overwrites_weights_that_the_result_no_longer_refers_to(
    lie_in, command, tmp_path, monkeypatch, capsys
):
    if "--simplify" in command:
        pytest.importorskip("onnxslim")
    monkeypatch.chdir(tmp_path)
    onnx.save_model(stored_int8(), "int8.onnx", save_as_external_data=True, location=lie_in, size_threshold=0)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main(command.split()) == 2
    assert f"{lie_in} holds the weights of the input, which is never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_from_python_too_weights_are_only_overwritten_with_their_own_model(tmp_path):
    onnx.save_model(stored_int8(), tmp_path / "int8.onnx", save_as_external_data=True, location="out.onnx.data")
    result = qdq_surgeon.quantize(load(tmp_path / "int8.onnx", requantize=True), {"x": images()}, compare=False)
    with pytest.raises(ModelError, match=r"out.onnx.data holds the weights of the input"):
        qdq_surgeon.save(result.model, tmp_path / "out.onnx", external_data=True)
    for _ in range(2):
        qdq_surgeon.save(result.model, tmp_path / "other.onnx", external_data=True)
        load(tmp_path / "other.onnx")


def stored_int8() -> onnx.ModelProto:
    """A model whose weight is stored as INT8."""
    proto = model("""g (float[N,64] x) => (float[N,128] y) <int8[64,128] i, float s = {0.01}> {
        w = DequantizeLinear(i, s)
        y = MatMul(x, w)
    }""")
    values = np.random.default_rng(0).integers(-127, 128, (64, 128), np.int8)
    weight(proto, "i").CopyFrom(numpy_helper.from_array(values, "i"))
    return proto


def test_an_interrupt_between_model_and_weights_waits_for_both(tmp_path, monkeypatch):
    old, new = (model(TWO_WEIGHTS.replace("g (", f"{name} (")) for name in ("old", "new"))
    weight(new, "w").CopyFrom(numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    storage.save(old, tmp_path / "out.onnx", external_data=True)
    replace = Path.replace

    def interrupted(self, target):
        replace(self, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "replace", interrupted)
    with handler(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        storage.save(new, tmp_path / "out.onnx", external_data=True)
    written = onnx.load(tmp_path / "out.onnx")
    assert written.graph.name == "new"
    np.testing.assert_array_equal(values(written)["w"], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]


@contextlib.contextmanager
def handler(number, function):
    """Whoever started the tests may have switched the signal off."""
    before = signal.signal(number, function)
    try:
        yield
        assert signal.getsignal(number) is function
    finally:
        signal.signal(number, before)


def test_a_run_whose_weights_another_run_replaces_says_so(tmp_path, monkeypatch):
    replace = Path.replace

    def overtaken(self, target):
        replace(self, target)
        monkeypatch.setattr(Path, "replace", replace)
        storage.save(model(TWO_WEIGHTS), tmp_path / "out.onnx", external_data=True)

    monkeypatch.setattr(Path, "replace", overtaken)
    with pytest.raises(ModelError, match=r"another run wrote .*out.onnx.data at the same time"):
        storage.save(model(TWO_WEIGHTS), tmp_path / "out.onnx", external_data=True)


def test_what_takes_a_place_is_on_the_disk_before(tmp_path, monkeypatch):
    synced, replace = [], Path.replace

    def checked(self, target):
        assert self.stat().st_ino in synced
        replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(Path, "replace", checked)
    storage.save(model(TWO_WEIGHTS), tmp_path / "out.onnx", external_data=True)
    assert len(synced) == 2


def test_through_a_link_the_weights_lie_beside_what_it_leads_to(apart, tmp_path):
    (tmp_path / "link.onnx").symlink_to(apart.with_name("out.onnx"))
    storage.save(model(TWO_WEIGHTS), tmp_path / "link.onnx", external_data=True)
    assert apart.with_name("out.onnx.data").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link.onnx"]


def test_the_command_line_writes_both_files_and_touches_no_input(apart, capsys):
    np.savez(apart.with_name("data.npz"), x=images())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in apart.parent.iterdir()}
    assert insert_main([str(apart), "--data", str(apart.with_name("data.npz")), "--external-data"]) == 0
    after = {path.name for path in apart.parent.iterdir() if path not in before}
    assert after == {"model.qdq.onnx", "model.qdq.onnx.data"}
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


# ---- hostile ------------------------------------------------------------------------------------------------------


def test_a_constant_of_absurd_size_is_not_computed():
    text = """g (float[N,64] x) => (y) <int64[2] s = {64, 100000000}> {
        w = ConstantOfShape(s)
        y = MatMul(x, w)
    }"""
    with pytest.raises(ModelError, match="the constant 'w' cannot be computed: 'w' has 6400000000 elements"):
        load(model(text)).graph.value("w")


@pytest.mark.parametrize("location", ["..\\weights", "C:\\weights", "a/../../weights", "//host/weights", ""])
def test_locations_that_leave_the_folder_in_the_eyes_of_any_system_are_refused(location, apart):
    proto = onnx.load(apart, load_external_data=False)
    for tensor in proto.graph.initializer:
        weights.refer(tensor, location, 0, 16384)
    apart.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="lie outside the model's folder, where nothing is read"):
        load(apart)


@pytest.mark.parametrize("location", ["w" * 300, "with\0nothing"])
def test_a_name_that_no_system_takes_is_one_line(location, apart):
    proto = onnx.load(apart, load_external_data=False)
    weights.refer(weight(proto, "w"), location, 0, 16384)
    apart.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"its external data '.*' \(tensor 'w'\) cannot be read: "):
        load(apart)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no cp, and its cache no links")
def test_a_folder_of_links_is_refused_with_the_command_that_makes_it_whole(apart, tmp_path):
    """As the cache of Hugging Face's hub has it."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in apart.parent.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "in", path.name))
    with pytest.raises(ModelError, match="lead out of the model's folder through a link") as refused:
        load(snapshot / apart.name)
    command = re.search(r"cp -rL \S+ COPY", str(refused.value))[0]
    subprocess.run(command.split(), check=True, cwd=tmp_path)
    assert load(tmp_path / "COPY" / apart.name).digest == load(apart).digest


def test_a_pipe_in_the_place_of_weights_is_not_read(apart):
    apart.with_name("weights.bin").unlink()
    os.mkfifo(apart.with_name("weights.bin"))
    with pytest.raises(ModelError, match="are no file"):
        load(apart)
