"""onnxruntime sessions run what ONNX allows, and say in one line what they do not."""

import logging
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from qdq_surgeon.calibration import sessions
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session, trial
from qdq_surgeon.errors import DataError, ModelError, QdqError
from qdq_surgeon.graph import all_nodes
from tests.graphs import model

RELU = "g (float[N,2] x) => (y) { r = Relu(x)\n y = Neg(r) }"
ONE_SAMPLE_ONLY = "g (float[N,2] x) => (y) <int64[1] flat = {2}> { y = Reshape(x, flat) }"
TWO_SAMPLES = np.float32([[-1, 2], [3, -4]])

DOUBLED_IN_THE_GRAPH = "g (bool c, float[N] x) => (y) { r = Relu(x)\n y = Neg(r) }"
DOUBLED_IN_A_BODY = """g (bool c, float[N] x) => (y) {
    y = If<
        then_branch = yes () => (float[N] a) { n = Relu(x)\n a = Neg(n) },
        else_branch = no () => (float[N] b) { b = Neg(x) }
    >(c)
}"""
DOUBLED_IN_A_FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (bool c, float[N] x) => (float[N] y) { y = own.f(x) }
<domain: "own", opset_import: ["" : 17]> f (p) => (q) { n = Relu(p)\n q = Neg(n) }"""


@pytest.mark.parametrize("text", [DOUBLED_IN_THE_GRAPH, DOUBLED_IN_A_BODY, DOUBLED_IN_A_FUNCTION])
def test_doubled_node_names_do_not_keep_a_model_from_running_and_stay_in_it(text):
    proto = model(text)
    for node in (*all_nodes(proto.graph), *(node for function in proto.functions for node in function.node)):
        node.name = "twin"
    before = proto.SerializeToString()
    batch = Batch({"c": np.array(True), "x": np.float32([-1, 2])}, 2)
    np.testing.assert_array_equal(Session(proto).run(batch, ["y"])[0][0], [0, -2])
    assert proto.SerializeToString() == before


def test_the_named_outputs_come_in_the_order_asked_for():
    session = Session(model(RELU.replace("=> (y)", "=> (y, r)")))
    assert session.outputs == ("y", "r")
    (outputs,) = session.run(batch_of(TWO_SAMPLES), ["r", "y"])
    np.testing.assert_array_equal(outputs, [np.maximum(TWO_SAMPLES, 0), -np.maximum(TWO_SAMPLES, 0)])


def test_a_model_may_be_given_as_a_file(tmp_path):
    onnx.save(model(RELU), tmp_path / "model.onnx")
    assert Session(tmp_path / "model.onnx").outputs == ("y",)


def test_fp16_inputs_take_fp32_data():
    session = Session(model("g (float16[N,2] x) => (y) { y = Neg(x) }"))
    (outputs,) = session.run(batch_of(TWO_SAMPLES), ["y"])
    assert outputs[0].dtype == np.float16


def test_the_optimized_graph_is_kept_with_its_weights_beside_it(tmp_path):
    proto = model("g (float[N,32] x) => (y) <float[32,32] w, float[32] b> { m = MatMul(x, w)\n y = Add(m, b) }")
    Session(proto, save_to=tmp_path / "kept.onnx")
    kept = Session(tmp_path / "kept.onnx", as_is=True)
    x = batch_of(np.ones((2, 32), np.float32))
    np.testing.assert_allclose(kept.run(x, ["y"])[0][0], Session(proto).run(x, ["y"])[0][0], rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.onnx", "kept.onnx.data"]


# ---- One sample at a time --------------------------------------------------------------------------------------------


def test_where_a_batch_does_not_run_its_samples_run_one_at_a_time(caplog):
    session = Session(model(ONE_SAMPLE_ONLY))
    with caplog.at_level(logging.INFO, "qdq_surgeon"):
        for _ in range(2):
            runs = session.run(batch_of(TWO_SAMPLES), ["y"])
            np.testing.assert_array_equal([outputs[0] for outputs in runs], TWO_SAMPLES)
    assert [r.getMessage() for r in caplog.records] == [
        "the model does not run on 2 samples at once: one at a time from here on"
    ]


def test_that_is_said_once_by_however_many_threads(caplog):
    session, barrier = Session(model(ONE_SAMPLE_ONLY)), threading.Barrier(8)

    def run():
        barrier.wait()
        session.run(batch_of(np.zeros((8, 2), np.float32)), ["y"])

    threads = [threading.Thread(target=run) for _ in range(8)]
    with caplog.at_level(logging.INFO, "qdq_surgeon"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 1


def test_a_batch_that_cannot_be_cut_is_refused_with_the_reason():
    session = Session(model(ONE_SAMPLE_ONLY))
    with pytest.raises(DataError, match="onnxruntime cannot run the model on the data: ") as error:
        session.run(Batch({"x": TWO_SAMPLES}, 2), ["y"])
    assert_one_line(error)


# ---- What onnxruntime refuses ----------------------------------------------------------------------------------------


def test_a_refused_model_is_one_line():
    proto = model(RELU)
    proto.graph.node[0].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(ModelError, match=r"onnxruntime refuses the model: .*nobody") as error:
        Session(proto)
    assert_one_line(error)


def test_a_trial_gives_the_reason_and_opens_one_session(monkeypatch):
    opened = []
    monkeypatch.setattr(sessions, "Session", lambda proto, **_: opened.append(proto) or Session(proto))
    runs = trial(model(RELU))
    assert not opened
    assert runs({"x": TWO_SAMPLES}) is None
    assert "rank" in runs({"x": TWO_SAMPLES[0]})
    assert len(opened) == 1


def test_an_unknown_provider_is_refused_with_the_nearest_name():
    with pytest.raises(QdqError) as error:
        Session(model(RELU), provider="tensorrtt")
    assert str(error.value) == "unknown provider 'tensorrtt'. Did you mean 'tensorrt'? Providers: cpu, cuda, tensorrt"


def test_a_provider_that_this_onnxruntime_lacks_is_refused_with_what_it_has(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(QdqError) as error:
        Session(model(RELU), provider="tensorrt")
    assert str(error.value) == (
        "this onnxruntime has no tensorrt provider (it has: cpu): pip install onnxruntime-gpu, or use another"
    )


def test_a_provider_that_does_not_start_is_refused(monkeypatch):
    """onnxruntime itself falls back to the CPU, with a word on stderr."""

    class OnTheCpu:
        def __init__(self, source, options, providers, disabled_optimizers):
            assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", OnTheCpu)
    with pytest.raises(QdqError, match="onnxruntime cannot start its cuda provider here: check driver and libraries"):
        Session(model(RELU), provider="cuda")


def batch_of(x):
    return Batch({"x": x}, len(x), frozenset({"x"}))


def assert_one_line(error):
    assert "\n" not in str(error.value)
