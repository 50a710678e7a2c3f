"""The public functions: what goes in, what comes out, and that nothing else happens."""

import logging
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon.errors import DataError, FilterError, ModelError, PlacementError, PlanError, QdqError
from tests.graphs import model

CLASSIFIER = """g (float[N,3,8,8] x) => (float[N,16] y)
<float[32,3,8,8] w, float[32] b, float[16,32] fw, float[16] fb> {
    c = Conv(x, w, b)
    r = Relu(c)
    f = Flatten(r)
    y = Gemm<transB=1>(f, fw, fb)
}"""

NOTHING_TO_DO = "g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"

PUBLIC = """
apply calibrate choose compare insert load plan quantize save sensitivity
Comparison Edge Kept Miss Plan Preprocessing Result Scales Site Statistic Statistics
DataError FilterError ModelError PlacementError PlanError QdqError
"""


def images(count=20, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


# ---- what a model may be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ModelProto", "path", "text path", "carrier", "loaded"])
def test_every_kind_of_model_gives_the_same_result(kind, tmp_path):
    proto = model(CLASSIFIER)
    onnx.save(proto, tmp_path / "model.onnx")
    source = {
        "ModelProto": proto,
        "path": tmp_path / "model.onnx",
        "text path": str(tmp_path / "model.onnx"),
        "carrier": types.SimpleNamespace(model_proto=proto),
        "loaded": qdq_surgeon.load(proto),
    }[kind]
    result = qdq_surgeon.quantize(source, {"x": images()})
    assert isinstance(result.model, onnx.ModelProto)
    assert result.model == qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()}).model


def test_anything_else_is_refused():
    with pytest.raises(ModelError, match=r"a path, a ModelProto or has .model_proto"):
        qdq_surgeon.quantize(42)


# ---- nothing else happens ---------------------------------------------------------------------------------------


def test_the_callers_model_is_never_changed():
    proto = model(CLASSIFIER)
    before = proto.SerializeToString()
    qdq_surgeon.quantize(proto, {"x": images()})
    assert proto.SerializeToString() == before


def test_the_result_is_a_model_of_its_own_also_where_nothing_was_to_be_done():
    proto = model(NOTHING_TO_DO)
    result = qdq_surgeon.quantize(proto, {"x": np.ones((2, 3), np.float32)})
    result.model.graph.name = "changed"
    assert proto.graph.name == "g"


def test_the_callers_data_are_never_changed():
    x = images()
    before = x.copy()
    qdq_surgeon.quantize(model(CLASSIFIER), {"x": x})
    np.testing.assert_array_equal(x, before)


def test_the_models_metadata_survive_and_ours_are_added():
    proto = model(CLASSIFIER)
    proto.metadata_props.add(key="license", value="of somebody")
    written = {entry.key: entry.value for entry in qdq_surgeon.quantize(proto, {"x": images()}).model.metadata_props}
    assert written["license"] == "of somebody"
    assert written["qdq_surgeon.data"] == "given"


def test_nothing_is_printed(capfd):
    qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()})
    qdq_surgeon.quantize(model(CLASSIFIER))
    assert capfd.readouterr() == ("", "")


def test_the_root_logger_is_left_alone():
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.raiseExceptions)
    qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()})
    assert (root.level, list(root.handlers), logging.raiseExceptions) == before


def test_importing_the_package_loads_no_runtime():
    heavy = ("onnx", "onnxruntime", "rich", "polygraphy", "onnx_graphsurgeon", "numpy")
    code = f"import sys, qdq_surgeon; print([name for name in {heavy!r} if name in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


def test_planning_loads_no_runtime():
    code = (
        "import sys, qdq_surgeon, onnx.parser\n"
        "text = '<ir_version: 8, opset_import: [\"\" : 17]> g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }'\n"
        "from qdq_surgeon.model import load\n"
        "from qdq_surgeon.rules.placement import load_placement\n"
        "from qdq_surgeon.rules.planner import make_plan\n"
        "make_plan(load(onnx.parser.parse_model(text)), load_placement())\n"
        "print([name for name in ('onnxruntime', 'rich', 'onnx_graphsurgeon') if name in sys.modules])"
    )
    assert in_a_fresh_process(code) == "[]"


# ---- the names --------------------------------------------------------------------------------------------------


def test_the_public_names_are_these_and_all_can_be_reached():
    assert set(qdq_surgeon.__all__) == set(PUBLIC.split()) == set(dir(qdq_surgeon))
    for name in qdq_surgeon.__all__:
        assert getattr(qdq_surgeon, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        _ = qdq_surgeon.quantise


@pytest.mark.parametrize("error", [DataError, FilterError, ModelError, PlacementError, PlanError])
def test_every_error_is_a_qdq_error(error):
    assert issubclass(error, QdqError)


# ---- the stages -------------------------------------------------------------------------------------------------


def test_the_stages_one_by_one_give_what_quantize_gives():
    proto, x = model(CLASSIFIER), {"x": images(12)}
    whole = qdq_surgeon.quantize(proto, x, method="entropy")
    plan = qdq_surgeon.plan(proto)
    statistics = qdq_surgeon.calibrate(proto, plan, x)
    scales = qdq_surgeon.choose(proto, plan, statistics, "entropy")
    quantized = qdq_surgeon.insert(proto, plan, scales)
    comparison = qdq_surgeon.compare(proto, quantized, x)
    assert plan == whole.plan
    assert as_lists(scales) == as_lists(whole.scales)
    assert quantized == whole.model
    assert comparison.outputs[0].sqnr == pytest.approx(whole.comparison.outputs[0].sqnr)


def test_apply_takes_a_plan_that_was_saved():
    proto, x = model(CLASSIFIER), {"x": images()}
    plan = qdq_surgeon.Plan.from_json(qdq_surgeon.plan(proto).to_json())
    assert qdq_surgeon.apply(proto, plan, x).model == qdq_surgeon.quantize(proto, x).model


def test_another_method_needs_no_other_run():
    proto, x = model(CLASSIFIER), {"x": images(12)}
    plan = qdq_surgeon.plan(proto)
    statistics = qdq_surgeon.calibrate(proto, plan, x)
    by_method = {name: qdq_surgeon.choose(proto, plan, statistics, name) for name in ("max", "percentile:90")}
    for name, scales in by_method.items():
        alone = qdq_surgeon.quantize(proto, x, method=name, compare=False).scales
        assert as_lists(scales) == as_lists(alone)
    assert by_method["max"].values["x", None] > by_method["percentile:90"].values["x", None]


def test_the_comparison_can_be_left_out():
    assert qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()}, compare=False).comparison is None


@pytest.mark.parametrize(("samples", "used"), [(None, 20), (7, 7), (100, 20)])
def test_calibrate_uses_all_data_or_the_samples_asked_for(samples, used):
    proto = model(CLASSIFIER)
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), {"x": images(20)}, samples=samples)
    assert statistics.origin.samples == used
    assert statistics.tensors["x"].count == used * 3 * 8 * 8


def test_quantize_compares_on_data_that_calibration_has_not_seen_where_there_are_enough():
    few = qdq_surgeon.quantize(model(CLASSIFIER), {"x": images(15)})
    many = qdq_surgeon.quantize(model(CLASSIFIER), {"x": images(64)})
    assert (few.scales.origin.samples, few.comparison.samples, few.comparison.held_out) == (15, 15, False)
    assert (many.scales.origin.samples, many.comparison.samples, many.comparison.held_out) == (48, 16, True)


def test_without_data_the_inputs_are_made_up_and_the_result_says_so():
    result = qdq_surgeon.quantize(model(CLASSIFIER))
    assert result.scales.origin.synthetic
    written = {entry.key: entry.value for entry in result.model.metadata_props}
    assert written["qdq_surgeon.data"] == "synthetic"


def test_shapes_give_the_sizes_of_made_up_inputs():
    proto = model("g (float[N,L,32] x) => (float[N,L,16] y) <float[32,16] w> { y = MatMul(x, w) }")
    plan = qdq_surgeon.plan(proto)
    statistics = qdq_surgeon.calibrate(proto, plan, shapes={"x": (2, 5, 32)}, samples=4)
    assert statistics.tensors["x"].count == statistics.origin.samples * 5 * 32


def test_progress_names_the_stages():
    stages = [stage for stage, _, _ in progress_over(40)]
    assert list(dict.fromkeys(stages)) == ["calibrate", "correct", "compare"]


@pytest.mark.parametrize("count", [10, 20, 40, 64])
def test_progress_never_runs_past_its_total(count):
    for _, done, total in progress_over(count):
        assert total is None or 0 < done <= total


def test_progress_may_stop_the_run_by_raising():
    def stop(stage, done, total):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()}, progress=stop)


# ---- filters and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "quantized"),
    [
        ({}, "x w f fw"),
        ({"exclude": "c"}, "f fw"),
        ({"exclude": ["c", "y"]}, ""),
        ({"exclude": lambda node: node.op == "Conv"}, "f fw"),
        ({"exclude": [lambda node: node.op == "Conv"], "op_types": ["Conv", "Gemm"]}, "f fw"),
        ({"include": lambda node: node.op == "Gemm"}, "f fw"),
        ({"include": "c"}, "x w"),
        ({"op_types": ["Gemm"]}, "f fw"),
        ({"op_types": "Gemm"}, "f fw"),
    ],
)
def test_filters_take_names_and_functions(filters, quantized):
    result = qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()}, compare=False, **filters)
    read = [node.input[0] for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(read) == sorted(quantized.split())


def test_a_callers_own_predicate_can_be_named_in_a_rule(tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[[rule]]\nname = "mine"\nmatch = "Gemm(x, w, ...)"\nwhere = { x = "of_mine" }\n'
        'quantize = ["x", "w"]\nbecause = "I say so."\n'
    )
    result = qdq_surgeon.plan(
        model(CLASSIFIER), placement=rules, predicates={"of_mine": lambda view, it: it.tensor == "f"}
    )
    assert [site.tensor for site in result.sites] == ["f", "fw"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"method": "msee"}, QdqError),
        ({"placement": "tensort"}, PlacementError),
        ({"exclude": "nobody"}, FilterError),
        ({"op_types": ["Conf"]}, FilterError),
        ({"data": {"z": images()}}, DataError),
        ({"shapes": {"z": (1, 3, 8, 8)}, "data": None}, DataError),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, error):
    with pytest.raises(error) as raised:
        qdq_surgeon.quantize(model(CLASSIFIER), **({"data": {"x": images()}} | arguments))
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


def test_a_method_is_refused_before_the_model_runs():
    told = []
    with pytest.raises(QdqError, match="msee"):
        qdq_surgeon.quantize(
            model(CLASSIFIER), {"x": images()}, method="msee", progress=lambda *step: told.append(step)
        )
    assert not told


@pytest.mark.parametrize("stage", ["calibrate", "apply", "choose", "insert"])
def test_a_plan_of_another_model_is_refused_as_such(stage):
    """Also where all its tensor names exist in this one."""
    proto, x = model(CLASSIFIER), {"x": images()}
    other = model(CLASSIFIER.replace("Relu", "Sigmoid"))
    plan = qdq_surgeon.plan(other)
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), x)
    scales = qdq_surgeon.choose(proto, qdq_surgeon.plan(proto), statistics)
    calls = {
        "calibrate": lambda: qdq_surgeon.calibrate(proto, plan, x),
        "apply": lambda: qdq_surgeon.apply(proto, plan, x),
        "choose": lambda: qdq_surgeon.choose(proto, plan, statistics),
        "insert": lambda: qdq_surgeon.insert(proto, plan, scales),
    }
    with pytest.raises(PlanError, match="the plan belongs to another model"):
        calls[stage]()


def test_a_quantized_model_stays_as_it_is_or_is_quantized_afresh():
    quantized = qdq_surgeon.quantize(model(CLASSIFIER), {"x": images()}).model
    assert qdq_surgeon.quantize(quantized, {"x": images()}).model == quantized
    assert qdq_surgeon.quantize(quantized, {"x": images()}, requantize=True).model == quantized


# ---- texts ------------------------------------------------------------------------------------------------------


def test_every_result_says_what_it_holds():
    proto, x = model(CLASSIFIER), {"x": images(12)}
    result = qdq_surgeon.quantize(proto, x)
    statistics = qdq_surgeon.calibrate(proto, result.plan, x)
    assert_mentions(result, "4 Q/DQ pairs", "SQNR", "y")
    assert_mentions(result.plan, "4 Q/DQ pairs for 4 edges", "x -> Conv c[0]", "fw (axis 0) -> Gemm y[1]", "conv: ")
    assert_mentions(result.scales, "mse", "12 samples", "x: ", "w: ", "for 32 channels")
    assert_mentions(result.comparison, "SQNR", "dB", "y", "12 samples")
    assert_mentions(statistics, "2 tensors", "12 samples", f"x: {x['x'].min():.6g} .. {x['x'].max():.6g}")
    assert_mentions(statistics.tensors["x"], "minimum", "maximum", "count")
    assert_mentions(result.plan.sites[0], "x -> Conv c[0]")
    assert_mentions(result.plan.sites[0].edges[0], "Conv c[0]")
    assert_mentions(result.plan.kept[0], "Conv c[2]")


def test_scales_say_which_edges_went_back_to_float():
    text = """g (float[N,16,8,8] a, float[N,16,8,8] b) => (z) <float[16,32,3,3] w> {
        y = Concat<axis=1>(a, b)
        z = Conv(y, w)
    }"""
    x = np.random.default_rng(0).standard_normal((4, 16, 8, 8)).astype(np.float32)
    scales = qdq_surgeon.quantize(model(text), {"a": x, "b": 100 * x}).scales
    assert_mentions(scales, "Concat y[0]", "factor of 100")


# ---- helpers ----------------------------------------------------------------------------------------------------


def progress_over(count):
    told = []
    qdq_surgeon.quantize(model(CLASSIFIER), {"x": images(count)}, progress=lambda *step: told.append(step))
    return told


def as_lists(scales):
    return {site: scale.tolist() for site, scale in scales.values.items()}


def assert_mentions(value, *words):
    text = str(value)
    assert [word for word in words if word not in text] == []
    assert "object at 0x" not in text


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()
