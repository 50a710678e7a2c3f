"""The range method chosen by trying: planted winners, the guard on samples it was not chosen on, and what it says."""

import weakref

import numpy as np
import pytest
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.ranges import DEFAULT_METHOD, range_method
from qdq_surgeon.errors import DataError, ModelError, QdqError
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose, insert
from qdq_surgeon.refinement import auto
from qdq_surgeon.refinement.auto import CANDIDATES, MethodChoice, best_method
from qdq_surgeon.refinement.judging import decibels, judged, parted, relative_error
from qdq_surgeon.refinement.lockstep import walk
from tests.graphs import model, shuffled
from tests.refinement.nets import rows, singles, with_weights

LAYER = "g (float[N,16] x) => (float[N,16] y) <float[16,16] w> { y = MatMul(x, w) }"


def with_outliers(number=90):
    """One value is a hundred times as large as the others, and comes first."""
    x = rows(number, 16)
    x[0, 0] = 3000
    return x


def rare_and_decisive(number=90):
    """Large values in one channel of every third sample carry nearly all of the output."""
    x = rows(number, 16) * 0.01
    x[::3, 0] = 40 + 10 * rows(number, 1)[::3, 0]
    return x


def built(x, text=LAYER):
    """The loaded model, and how a method makes its Q/DQ model."""
    source = load(model(text) if isinstance(text, str) else text)
    plan = qdq_surgeon.plan(source)
    statistics = calibrate(source, plan, {"x": x})
    return source, lambda method: insert(source, plan, choose(source, plan, statistics, method))


def errors_by_method(source, build, samples):
    return {method: relative_error(walk(source, build(method), samples, judged(source.graph))) for method in CANDIDATES}


# ---- what is chosen ---------------------------------------------------------------------------------------------


def test_the_candidates_are_methods_and_the_default_comes_first():
    for method in CANDIDATES:
        range_method(method)
    assert CANDIDATES[0] == DEFAULT_METHOD


@pytest.mark.parametrize("make", [with_outliers, rare_and_decisive])
def test_the_best_is_the_best_on_the_choosing_samples(make):
    x = make()
    source, build = built(x)
    chosen_on, judging = parted(singles(x))
    found = best_method(source, build, singles(x))
    tried = errors_by_method(source, build, chosen_on)
    assert tried[found.best] == min(tried.values())
    others = errors_by_method(source, build, judging)
    assert found.sqnr == pytest.approx(decibels(others[found.best]))
    assert found.default_sqnr == pytest.approx(decibels(others[DEFAULT_METHOD]))
    assert (found.tried, found.judged) == (60, 30)
    assert others[found.method] <= others[DEFAULT_METHOD]


def test_max_loses_where_one_value_is_an_outlier():
    """It is in none of the samples that are looked at, to which max leaves few of its levels."""
    x = with_outliers()
    source, build = built(x)
    found = best_method(source, build, singles(x[1:]))
    tried = errors_by_method(source, build, singles(x[1:]))
    assert found.method != "max"
    assert tried["max"] > 2 * tried[found.method]


def test_max_wins_where_the_rarest_values_matter_most():
    """Three values in two million reach 30, all others 5: mse clips them. But the output is made of their channel."""
    x = np.clip(rows(30, 1000, 64), -5, 5)
    x[[3, 11, 25], 17, 0] = 30
    text = "g (float[N,1000,64] x) => (float[N,1000,16] y) <float[64,16] w> { y = MatMul(x, w) }"
    proto = with_weights(model(text), w=np.vstack([np.full((1, 16), 1.0), np.full((63, 16), 0.001)]))
    source, build = built(x, proto)
    found = best_method(source, build, singles(x))
    assert found.method == "max"
    assert found.sqnr > found.default_sqnr + 3


# ---- planted figures --------------------------------------------------------------------------------------------


def planted(monkeypatch, choosing, judging, samples=9, default=0.5):
    """`best_method` where the errors are these, by method; what is not named errs by `default`."""
    fitted = len(parted(range(samples))[0])

    def told(source, method, batches, results):
        given = choosing if len(batches) == fitted else judging
        return given.get(method, default)

    monkeypatch.setattr(auto, "walk", told)
    monkeypatch.setattr(auto, "relative_error", lambda error: error)
    source = load(model(LAYER))
    return best_method(source, lambda method: method, singles(rows(samples, 16)))


@pytest.mark.parametrize("best", [method for method in CANDIDATES if method != DEFAULT_METHOD])
def test_the_planted_best_is_taken(best, monkeypatch):
    found = planted(monkeypatch, {best: 0.001}, {best: 0.002})
    assert (found.method, found.best) == (best, best)
    assert str(found) == f"range method {best}: the best of 5 on 6 samples; 27.0 dB against 3.0 dB by mse on 3 others"


def test_the_default_is_kept_where_the_best_is_worse_on_the_others(monkeypatch):
    found = planted(monkeypatch, {"entropy": 0.001}, {"entropy": 0.5, "mse": 0.1})
    assert (found.method, found.best) == (DEFAULT_METHOD, "entropy")
    assert str(found).endswith("; 3.0 dB against 10.0 dB by mse on 3 others, so mse is kept")


def test_as_good_as_the_default_on_the_others_is_enough(monkeypatch):
    assert planted(monkeypatch, {"max": 0.001}, {}).method == "max"


def test_the_default_wins_a_tie(monkeypatch):
    found = planted(monkeypatch, {}, {"max": 0.001})
    assert (found.method, found.best) == (DEFAULT_METHOD, DEFAULT_METHOD)
    assert str(found) == "range method mse: the best of 5 on 6 samples"


def test_where_too_few_samples_judge_themselves_that_is_said(monkeypatch):
    found = planted(monkeypatch, {"max": 0.001}, {}, samples=2)
    assert (found.tried, found.judged) == (2, 0)
    assert str(found).endswith("on the same")


def test_one_qdq_model_is_held_at_a_time():
    source, build = built(rows(9, 16))
    alive, most = weakref.WeakSet(), 0

    def counting(method):
        nonlocal most
        made = Held(build(method))
        alive.add(made)
        most = max(most, len(alive))
        return made

    class Held:
        def __init__(self, proto):
            self.proto = proto

    def told(source, held, batches, results):
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "walk", told)
        patch.setattr(auto, "relative_error", lambda error: error)
        best_method(source, counting, singles(rows(9, 16)))
    assert most <= 2


# ---- the whole line ---------------------------------------------------------------------------------------------


def test_the_result_has_the_scales_of_the_method_it_names():
    x = with_outliers(60)
    result = qdq_surgeon.quantize(model(LAYER), {"x": x}, method="auto", bias_correction=False, compare=False)
    assert isinstance(result.choice, MethodChoice)
    assert result.scales.method == result.choice.method
    same = qdq_surgeon.quantize(
        model(LAYER), {"x": x}, method=result.choice.method, bias_correction=False, compare=False
    )
    assert result.model == same.model
    assert str(result.choice) in str(result)


def test_it_does_not_matter_how_the_nodes_are_stored():
    text = """g (float[N,16] x) => (float[N,16] y) <float[16,16] v, float[16,16] w> {
        h = MatMul(x, v)
        r = Relu(h)
        y = MatMul(r, w)
    }"""
    x = with_outliers(30)
    found = [
        qdq_surgeon.quantize(proto, {"x": x}, method="auto", compare=False).choice
        for proto in (model(text), shuffled(model(text), 3))
    ]
    assert found[0] == found[1]


def test_progress_is_told():
    seen = []
    x = rows(12, 16)
    qdq_surgeon.quantize(model(LAYER), {"x": x}, method="auto", compare=False, progress=lambda *told: seen.append(told))
    assert [told[1:] for told in seen if told[0] == "auto"] == [(number, 5) for number in range(1, 6)]


def test_statistics_with_data_serve():
    x = rows(12, 16)
    source = load(model(LAYER))
    plan = qdq_surgeon.plan(source)
    statistics = calibrate(source, plan, {"x": x})
    result = qdq_surgeon.quantize(model(LAYER), {"x": x}, statistics=statistics, method="auto", compare=False)
    assert result.choice is not None


def test_statistics_without_data_are_refused():
    source = load(model(LAYER))
    statistics = calibrate(source, qdq_surgeon.plan(source), {"x": rows(12, 16)})
    with pytest.raises(DataError, match="the method auto needs samples to look at: give data too"):
        qdq_surgeon.quantize(model(LAYER), statistics=statistics, method="auto")


def test_statistics_of_ranges_only_are_refused():
    source = load(model(LAYER))
    x = {"x": rows(12, 16)}
    statistics = calibrate(source, qdq_surgeon.plan(source), x, method="max")
    with pytest.raises(QdqError, match="hold ranges only, for the method max: calibrate again"):
        qdq_surgeon.quantize(model(LAYER), x, statistics=statistics, method="auto")


def test_a_calibration_cache_is_refused(tmp_path):
    with pytest.raises(QdqError, match="leaves the method auto nothing to choose"):
        qdq_surgeon.quantize(model(LAYER), {"x": rows(4, 16)}, calibration_cache=tmp_path / "none.cache", method="auto")


def test_a_model_that_comes_with_pairs_is_refused():
    x = {"x": rows(12, 16)}
    text = """g (float[N,16] x) => (float[N,16] y) <float s = {0.05}, int8 z = {0}, float[16,16] v, float[16,16] w> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        h = MatMul(d, v)
        r = Relu(h)
        y = MatMul(r, w)
    }"""
    with pytest.raises(ModelError, match="the method auto is for float models"):
        qdq_surgeon.quantize(model(text), x, method="auto")
    assert qdq_surgeon.quantize(model(text), x, method="auto", requantize=True, compare=False).choice


def test_auto_is_no_range_method_by_itself():
    """`choose` and `sensitivity` take one method, and say so."""
    source = load(model(LAYER))
    plan = qdq_surgeon.plan(source)
    statistics = calibrate(source, plan, {"x": rows(12, 16)})
    with pytest.raises(QdqError, match="unknown method 'auto'"):
        choose(source, plan, statistics, "auto")
    with pytest.raises(QdqError, match="unknown method 'auto'"):
        qdq_surgeon.sensitivity(source, plan, {"x": rows(12, 16)}, method="auto")


def test_weights_do_not_depend_on_the_method():
    x = with_outliers(30)
    _, build = built(x)
    scales = [
        numpy_helper.to_array(next(t for t in build(method).graph.initializer if t.name == "w_scale"))
        for method in CANDIDATES
    ]
    for other in scales[1:]:
        np.testing.assert_array_equal(scales[0], other)
