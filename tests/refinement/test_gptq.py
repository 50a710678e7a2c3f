"""GPTQ: integers against brute force and closed forms, patches against onnxruntime, models against themselves."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.graph import Graph
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose
from qdq_surgeon.refinement import gptq
from qdq_surgeon.refinement.gptq import WeightRounding, layers, round_weights, rounded
from qdq_surgeon.refinement.judging import decibels, judged, parted, relative_error
from qdq_surgeon.refinement.lockstep import walk
from tests.graphs import model
from tests.refinement.nets import prepared, rows, run, singles, weight, with_weights

SHIPPED = gptq.BLOCK


def correlated(number, inputs, seed=0, common=3.0):
    """Inputs that share most of what they hold."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, inputs)) + common * rng.standard_normal((number, 1))


def nearest(weights, scales):
    return np.clip(np.rint(weights / scales[..., None]), -127, 127)


def loss(weights, integers, scales, hessians):
    """The squared error of each output, over all positions: e' X'X e, written out."""
    error = weights - integers * scales[..., None]
    return np.array([[row @ hessian @ row for row in group] for group, hessian in zip(error, hessians, strict=True)])


def layer_of(outputs, inputs, seed=0, groups=1, common=3.0):
    """Random weights, scales that cover them, Hessians of correlated inputs."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((groups, outputs, inputs))
    x = [correlated(50, inputs, seed * 100 + group, common) for group in range(groups)]
    return weights, np.abs(weights).max(2) / 127, np.stack([part.T @ part for part in x])


# ---- integers ---------------------------------------------------------------------------------------------------


def brute_force(weights, scale, hessian):
    """The least loss among all integers next to the weights."""
    units = weights / scale
    choices = itertools.product(*({np.floor(u), np.ceil(u)} for u in units))
    found = [np.array(choice) for choice in choices]
    errors = [weights - integers * scale for integers in found]
    return min(error @ hessian @ error for error in errors)


def test_it_comes_close_to_brute_force():
    """One output, six correlated inputs: of what the nearest integers lose beyond the best, most is won back."""
    best, ours, plain = [], [], []
    for seed in range(60):
        weights, scales, hessians = layer_of(1, 6, seed)
        scales *= 10  # a coarse grid, so that rounding matters
        best.append(brute_force(weights[0, 0], scales[0, 0], hessians[0]))
        ours.append(loss(weights, rounded(weights, scales, hessians), scales, hessians)[0, 0])
        plain.append(loss(weights, nearest(weights, scales), scales, hessians)[0, 0])
    won = (np.mean(plain) - np.mean(ours)) / (np.mean(plain) - np.mean(best))
    assert np.mean(ours) < 0.5 * np.mean(plain)
    assert won > 0.75


def test_two_inputs_by_hand():
    """Equal inputs: what the first weight loses, 0.4 upwards, the second makes up for by rounding the other way."""
    weights, scales = np.array([[[1.4, 2.4]]]), np.array([[1.0]])
    assert nearest(weights, scales).tolist() == [[[1, 2]]]  # together 3 for 3.8
    found = rounded(weights, scales, np.ones((1, 2, 2)))
    assert found.sum() == 4


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 9),
    st.floats(0.01, 3),
    st.integers(0, 2**31),
)
def test_no_output_is_worse_than_by_the_nearest(groups, outputs, inputs, positions, coarse, seed):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((groups, outputs, inputs))
    scales = rng.uniform(0.1, 1, (groups, outputs)) * coarse
    x = rng.standard_normal((groups, positions, inputs)) * rng.choice([0, 1, 5], (groups, 1, inputs))
    hessians = x.transpose(0, 2, 1) @ x
    integers = rounded(weights, scales, hessians)
    assert integers.dtype == np.int8
    assert integers.min() >= -127
    before, after = (loss(weights, found, scales, hessians) for found in (nearest(weights, scales), integers))
    assert (after <= before * (1 + 1e-9) + 1e-12).all()


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest():
    weights, scales, _ = layer_of(5, 8, groups=2)
    hessians = np.stack([np.diag(np.arange(1.0, 9)), np.diag(np.arange(8.0, 0, -1))])
    np.testing.assert_array_equal(rounded(weights, scales, hessians), nearest(weights, scales))


def test_groups_do_not_see_each_other():
    weights, scales, hessians = layer_of(2, 9, groups=4)
    together = rounded(weights, scales * 8, hessians)
    for group in range(4):
        one = slice(group, group + 1)
        np.testing.assert_array_equal(rounded(weights[one], scales[one] * 8, hessians[one]), together[one])


def test_outputs_do_not_see_each_other():
    weights, scales, hessians = layer_of(6, 9)
    together = rounded(weights, scales * 8, hessians)
    for output in range(6):
        one = (slice(None), slice(output, output + 1))
        np.testing.assert_array_equal(rounded(weights[one], scales[one] * 8, hessians), together[one])


@pytest.mark.parametrize("size", [SHIPPED - 1, SHIPPED, SHIPPED + 1, 3 * SHIPPED + 7])
def test_blocks_change_nothing(size, monkeypatch):
    weights, scales, hessians = layer_of(3, size)
    monkeypatch.setattr(gptq, "BLOCK", 10**6)
    whole = rounded(weights, scales * 8, hessians)
    monkeypatch.setattr(gptq, "BLOCK", SHIPPED)
    np.testing.assert_array_equal(rounded(weights, scales * 8, hessians), whole)


def test_the_upper_factor_is_that_of_the_inverse():
    x = np.random.default_rng(0).standard_normal((2, 900, 2 * SHIPPED + 50))
    hessians = x.transpose(0, 2, 1) @ x
    upper = gptq._upper_factor(hessians)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.transpose(0, 2, 1) @ upper, np.linalg.inv(hessians), rtol=1e-6, atol=1e-10)


def test_a_factor_on_the_hessian_changes_nothing():
    weights, scales, hessians = layer_of(3, 9)
    expected = rounded(weights, scales * 8, hessians)
    for factor in (2.0**-60, 2.0**60):
        np.testing.assert_array_equal(rounded(weights, scales * 8, hessians * factor), expected)


def test_dead_inputs_are_rounded_to_the_nearest_and_do_not_matter():
    weights, scales, hessians = layer_of(4, 8)
    dead = hessians.copy()
    dead[:, 2:4] = dead[:, :, 2:4] = 0
    found = rounded(weights, scales * 8, dead)
    np.testing.assert_array_equal(found[..., 2:4], nearest(weights, scales * 8)[..., 2:4])
    rest = [0, 1, 4, 5, 6, 7]
    alone = rounded(weights[..., rest], scales * 8, dead[:, rest][:, :, rest])
    assert (
        loss(weights, found, scales * 8, dead).sum()
        <= 1.05 * loss(weights[..., rest], alone, scales * 8, dead[:, rest][:, :, rest]).sum()
    )


def test_a_hessian_of_zeros_means_the_nearest():
    weights, scales, hessians = layer_of(4, 8)
    np.testing.assert_array_equal(rounded(weights, scales, 0 * hessians), nearest(weights, scales))


def test_one_position_and_many_inputs():
    weights, scales, _ = layer_of(4, 40)
    x = np.random.default_rng(1).standard_normal((1, 1, 40))
    found = rounded(weights, scales * 8, x.transpose(0, 2, 1) @ x)
    error, plain = (x[0] @ (weights - i * scales[..., None] * 8)[0].T for i in (found, nearest(weights, scales * 8)))
    assert np.square(error).sum() < 0.2 * np.square(plain).sum()


def test_integers_end_at_127():
    weights, scales, hessians = layer_of(4, 12)
    found = rounded(weights, scales / 3, hessians)
    assert found.min() >= -127
    assert {found.min(), found.max()} == {-127, 127}


# ---- patches ----------------------------------------------------------------------------------------------------

CONVS = {
    "plain": ("", (2, 3, 9, 8), (4, 3, 3, 3)),
    "strides": ("strides=[2,3]", (2, 3, 9, 8), (4, 3, 3, 3)),
    "dilations": ("dilations=[2,1]", (2, 3, 9, 8), (4, 3, 3, 3)),
    "pads on each side": ("pads=[1,0,2,3]", (2, 3, 9, 8), (4, 3, 3, 2)),
    "all of them": ("strides=[2,1], dilations=[1,2], pads=[0,2,1,1]", (2, 3, 9, 8), (4, 3, 2, 3)),
    "SAME_UPPER": ('auto_pad="SAME_UPPER"', (2, 3, 9, 8), (4, 3, 3, 2)),
    "SAME_LOWER": ('auto_pad="SAME_LOWER"', (2, 3, 9, 8), (4, 3, 3, 2)),
    "SAME_UPPER and strides": ('auto_pad="SAME_UPPER", strides=[2,3]', (2, 3, 9, 8), (4, 3, 3, 2)),
    "SAME_LOWER and strides": ('auto_pad="SAME_LOWER", strides=[2,3]', (2, 3, 9, 8), (4, 3, 4, 4)),
    "VALID": ('auto_pad="VALID", strides=[2,1]', (2, 3, 9, 8), (4, 3, 3, 2)),
    "groups": ("group=3, pads=[1,1,1,1]", (2, 6, 7, 7), (9, 2, 3, 3)),
    "depthwise": ("group=6, pads=[1,1,1,1]", (2, 6, 7, 7), (6, 1, 3, 3)),
    "1D": ("pads=[2,1], strides=[2]", (2, 3, 20), (4, 3, 5)),
    "3D": ("pads=[1,0,1,1,0,0]", (2, 3, 5, 4, 6), (4, 3, 3, 2, 2)),
    "1x1": ("", (2, 3, 4, 4), (5, 3, 1, 1)),
}


def patches(x, node, shape, most=10**6):
    """All of them in the order of the positions: the draw is undone."""

    class InOrder:
        def permutation(self, number):
            return np.arange(number)

    return gptq._patches(x, node, shape, InOrder(), most)


def floats(shape):
    return ",".join(map(str, shape))


@pytest.mark.parametrize("case", CONVS)
def test_patches_by_the_weight_are_the_conv(case):
    attributes, data, kernel = CONVS[case]
    text = f"g (float[{floats(data)}] x) => (y) <float[{floats(kernel)}] w> {{ y = Conv<{attributes}>(x, w) }}"
    proto = model(text.replace("<>", ""))
    x = rows(*data)
    expected = run(proto, {"x": x})["y"]
    (node,) = Graph(proto).nodes
    groups = node.attribute("group")
    found = patches(x, node, kernel).reshape(-1, groups, int(np.prod(kernel[1:])))
    weights = weight(proto, "w").reshape(groups, kernel[0] // groups, -1)
    outputs = np.einsum("pgi,goi->pgo", found, weights).reshape(len(x), -1, kernel[0])
    np.testing.assert_allclose(outputs.transpose(0, 2, 1).reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("data", [(5, 7), (2, 4, 7), (2, 3, 4, 7)])
def test_patches_of_a_matmul_are_the_rows(data):
    proto = model(f"g (float[{floats(data)}] x) => (y) <float[7,6] w> {{ y = MatMul(x, w) }}")
    x = rows(*data)
    (node,) = Graph(proto).nodes
    found = patches(x, node, (7, 6)) @ weight(proto, "w")
    np.testing.assert_allclose(found.reshape(*data[:-1], 6), run(proto, {"x": x})["y"], atol=1e-5)


def test_some_patches_are_drawn_from_everywhere():
    """As many rows as columns: evenly spaced ones would all lie in the first column, which reads the padding."""
    proto = model("g (float[1,1,128,128] x) => (y) <float[1,1,1,1] w> { y = Conv(x, w) }")
    (node,) = Graph(proto).nodes
    x = np.broadcast_to(np.arange(128, dtype=np.float32), (1, 1, 128, 128))
    found = gptq._patches(x, node, (1, 1, 1, 1), np.random.default_rng(0), 128)
    assert found.shape == (128, 1)
    assert len(np.unique(found)) > 60


def test_no_position_at_all():
    proto = model("g (float[N,7] x) => (y) <float[7,6] w> { y = MatMul(x, w) }")
    (node,) = Graph(proto).nodes
    assert patches(np.zeros((0, 7), np.float32), node, (7, 6)).shape == (0, 7)


def test_what_a_layer_reads_is_what_its_pair_gives():
    x = np.array([-300, -1.5, -0.5, 0.5, 1.4, 126.6, np.inf, np.nan], np.float32) * np.float32(0.5)
    levels = gptq._levels(x, np.float32(0.5))
    assert levels.tolist() == [-128, -2, 0, 0, 1, 127, 127, 0]


# ---- layers -----------------------------------------------------------------------------------------------------


def layers_of(text, opset=17, **filters):
    source = load(model(text, opset) if isinstance(text, str) else text)
    plan = qdq_surgeon.plan(source, **filters)
    return [layer.node.first_output for layer in layers(source.graph, plan.sites)]


def test_convs_and_gemms_and_matmuls_are_taken():
    text = """g (float[N,16,4,4] x) => (y) <float[16,16,1,1] w1, float[64,256] w2, float[64,32] w3, float[32,16] w4> {
        c = Conv(x, w1)
        f = Flatten(c)
        g1 = Gemm<transB=1>(f, w2)
        g2 = Gemm(g1, w3)
        y = MatMul(g2, w4)
    }"""
    assert layers_of(text) == ["c", "g1", "g2", "y"]


LEFT = {
    "a shared weight": (
        "g (float[N,16] x) => (y) <float[16,16] w> { a = MatMul(x, w)\n b = Relu(a)\n y = MatMul(b, w) }"
    ),
    "a weight that is a graph output": "g (float[N,16] x) => (y, w) <float[16,16] w> { y = MatMul(x, w) }",
    "a computed weight": """g (float[N,16] x) => (y) <float[16,16] v> {
        w = Transpose<perm=[1,0]>(v)
        y = MatMul(x, w)
    }""",
    "transA": "g (float[16,8] x) => (y) <float[16,16] w> { y = Gemm<transA=1>(x, w) }",
    "ConvTranspose": "g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w> { y = ConvTranspose(x, w) }",
    "a batch of weights": "g (float[3,8,16] x) => (y) <float[3,16,16] w> { y = MatMul(x, w) }",
    "two activations": "g (float[16,16] x, float[16,16] v) => (y) { y = MatMul(x, v) }",
    "pairs that came with the model": """g (float[N,16,8,8] x) => (y)
    <float s = {0.05}, int8 z = {0}, float[16,16,3,3] w> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        qw = QuantizeLinear(w, s, z)
        dw = DequantizeLinear(qw, s, z)
        y = Conv(d, dw)
    }""",
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone(case):
    assert layers_of(LEFT[case]) == []


def test_ops_in_bodies_are_left_alone():
    text = """g (float[N,16] x, bool c) => (float[N,16] z) <float[16,16] w, float[16,16] v> {
        y = MatMul(x, w)
        z = If (c) <
            then_branch = yes () => (float[N,16] a) { a = MatMul(y, v) },
            else_branch = no () => (float[N,16] d) { d = Neg(y) }
        >
    }"""
    source = load(model(text))
    plan = qdq_surgeon.plan(source)
    assert {edge.scope for site in plan.sites for edge in site.edges} == {(), ("z.then_branch",)}
    assert layers_of(text) == ["y"]


def test_ops_without_a_pair_on_the_data_are_left_alone():
    text = "g (float[N,16] x) => (y) <float[16,16] w> { y = MatMul(x, w) }"
    assert layers_of(text) == ["y"]
    assert layers_of(text, placement="weights-only") == []


def test_weights_per_tensor_are_left_alone():
    text = "g (float[1,16,8,8] x) => (y) <float[16,16,3,3] w> { y = Conv(x, w) }"
    source = load(model(text))
    sites = [dataclasses.replace(site, axis=None) for site in qdq_surgeon.plan(source).sites]
    assert list(layers(source.graph, sites)) == []


def test_weights_along_their_inputs_are_left_alone():
    text = "g (float[N,16] x) => (y) <float[16,24] w> { y = Gemm(x, w) }"
    source = load(model(text))
    sites = [dataclasses.replace(site, axis=0) if site.weight else site for site in qdq_surgeon.plan(source).sites]
    assert list(layers(source.graph, sites)) == []


def test_layers_too_wide_for_a_hessian_are_left_alone(monkeypatch):
    text = "g (float[N,16,8,8] x) => (y) <float[8,16,3,3] w> { y = Conv(x, w) }"
    monkeypatch.setattr(gptq, "MOST_INPUTS", 144)
    assert layers_of(text) == ["y"]
    monkeypatch.setattr(gptq, "MOST_INPUTS", 143)
    assert layers_of(text) == []


# ---- models -----------------------------------------------------------------------------------------------------

NET = """g (float[N,16,8,8] x) => (float[N,16] y)
<float[16,16,3,3] w1, float[16] b1, float[16,1,3,3] w2, float[24,16,1,1] w3, float[1536,16] w4> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<group=16, pads=[1,1,1,1]>(r1, w2)
    r2 = Relu(c2)
    c3 = Conv(r2, w3)
    f = Flatten(c3)
    y = MatMul(f, w4)
}"""


def alike(number, seed=0):
    """Images whose channels and pixels share most of what they hold."""
    return (rows(number, 16, 8, 8, seed=seed) * 0.3 + rows(number, 1, 8, 1, seed=seed + 1)).astype(np.float32)


def rounding(text_or_proto, x, opset=17, placement="tensorrt", edit=None):
    """The loaded model, its Q/DQ model, scales, and what GPTQ makes of it."""
    source, plan, quantized = prepared(text_or_proto, x, opset, placement=placement)
    scales = choose(source, plan, calibrate(source, plan, {"x": x}))
    scales = edit(scales) if edit else scales
    return source, plan, quantized, scales, round_weights(source, plan, scales, quantized, singles(x))


def test_weights_lie_on_the_grid_so_that_their_pair_changes_nothing():
    _, plan, quantized, scales, done = rounding(NET, alike(12))
    assert set(done.values) == {"w1", "w2", "w3", "w4"}
    changed = with_weights(quantized, **done.values)
    for site in plan.sites:
        if site.weight:
            name = site.tensor
            shape = [1] * done.values[name].ndim
            shape[site.axis] = -1
            integers = done.values[name] / scales.of(site).reshape(shape)
            np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
            assert np.abs(np.rint(integers)).max() <= 127
            seen = _tensor(changed, f"{name}_dequantized")
            np.testing.assert_array_equal(seen, done.values[name])


def _tensor(proto, name):
    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.graph.output.add(name=name)
    session = Session(copy, simulate=True)
    return session.run(Batch({"x": alike(1)}, 1), [name])[0][0]


def test_the_layers_output_error_falls():
    """One layer, correlated inputs: what it makes of fresh samples is nearer to what the float layer makes."""
    text = "g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,3,3] w> { y = Conv<pads=[1,1,1,1]>(x, w) }"
    _, _, quantized, _, done = rounding(text, alike(24))
    fresh = alike(16, seed=50)
    expected = run(model(text), {"x": fresh})["y"]
    ours = with_weights(quantized, **done.values)
    errors = [np.square(expected - run(proto, {"x": fresh}, simulate=True)["y"]).sum() for proto in (quantized, ours)]
    assert errors[1] < errors[0]
    assert done.kept
    assert done.after > done.before


def test_every_head_is_rounded():
    """Two branches that never meet: the walk must not end with the first."""
    text = """g (float[N,16,8,8] x) => (float[N,16,8,8] y, float[N,16,8,8] z)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3, float[16,16,1,1] w4> {
        a = Conv(x, w1)
        b = Relu(a)
        y = Conv(b, w2)
        c = Conv(x, w3)
        d = Relu(c)
        z = Conv(d, w4)
    }"""
    assert set(rounding(text, alike(9))[4].values) == {"w1", "w2", "w3", "w4"}


def test_later_layers_are_rounded_for_what_earlier_rounded_ones_give():
    _, plan, quantized, scales, done = rounding(NET, alike(12))
    source = load(model(NET))
    seen = {}
    real = gptq._rounded_weight

    def spy(graph, layer, scales, arrays):
        seen[layer.weight.tensor] = [array.copy() for array in arrays]
        return real(graph, layer, scales, arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_rounded_weight", spy)
        round_weights(source, plan, scales, quantized, singles(alike(12)))
    (layer,) = [layer for layer in layers(source.graph, plan.sites) if layer.weight.tensor == "w4"]
    earlier = {name: values for name, values in done.values.items() if name != "w4"}
    changed = with_weights(quantized, **earlier)
    changed.graph.output.add(name=layer.data.tensor)
    expected = Session(changed, simulate=True).run(Batch({"x": alike(12)[:1]}, 1), [layer.data.tensor])[0][0]
    np.testing.assert_allclose(seen["w4"][0], expected, atol=1e-4)


def test_the_figures_are_those_of_the_judged_samples():
    x = alike(12)
    source, _, quantized, _, done = rounding(NET, x)
    fitting, judging = parted(singles(x))
    assert (done.fitted, done.judged) == (len(fitting), len(judging))
    for expected, weights in ((done.before, {}), (done.after, done.values)):
        boths = walk(source, quantized, judging, judged(source.graph), weights=weights)
        assert expected == pytest.approx(decibels(relative_error(boths)), abs=1e-3)


def test_nothing_is_kept_that_does_not_help():
    done = WeightRounding({"w": np.zeros(3)}, 8, 4, before=30.0, after=30.0)
    assert (done.kept, dict(done.weights)) == (False, {})
    assert str(done) == "1 weight not rounded by GPTQ, on 8 samples: SQNR 30.0 dB instead of 30.0 dB on 4 others"
    better = dataclasses.replace(done, after=30.5)
    assert set(better.weights) == {"w"}
    assert str(better) == "1 weight rounded by GPTQ, on 8 samples: SQNR 30.5 dB instead of 30.0 dB on 4 others"


def test_weights_that_help_only_where_they_were_fitted_are_not_kept():
    """Fitted on inputs that share all they hold, judged on inputs of which every other one has the other sign."""
    text = "g (float[N,64] x) => (float[N,16] y) <float[64,16] w> { y = MatMul(x, w) }"
    fitting = np.repeat(rows(20, 1), 64, axis=1)
    judging = np.repeat(rows(10, 1, seed=5), 64, axis=1) * np.resize([1, -1], 64)
    done = rounding(text, np.concatenate([fitting, judging]).astype(np.float32))[4]
    assert done.judged == 10
    assert done.after < done.before
    assert dict(done.weights) == {}


def test_two_samples_judge_themselves_and_that_is_said():
    done = rounding(NET, alike(2))[4]
    assert (done.fitted, done.judged) == (2, 0)
    assert str(done).endswith("on the same")


def test_nothing_to_round():
    done = rounding(NET, alike(6), placement="weights-only")[4]
    assert not done.values
    assert not done.kept
    assert str(done).startswith("nothing for GPTQ to round")


def test_edges_that_went_back_to_float_are_left_alone():
    """The scales drop what cannot share: such a layer has no pair, and its weight must stay as it is."""

    def drop(scales):
        source = load(model(NET))
        edges = [edge for site in qdq_surgeon.plan(source).sites for edge in site.edges if edge.reader == "c3"]
        return dataclasses.replace(scales, dropped=dict.fromkeys(edges, "planted"))

    assert set(rounding(NET, alike(6), edit=drop)[4].values) == {"w1", "w2", "w4"}


def test_activations_that_are_not_finite():
    """Log gives NaN below 0 and -inf at 0."""
    text = """g (float[N,16] x) => (float[N,16] y, float[N,16] z)
    <float[16,16] w1, float[16,16] w2, float[16,16] w2b> {
        h = MatMul(x, w1)
        l = Log(x)
        y = MatMul(l, w2)
        z = MatMul(h, w2b)
    }"""
    x = rows(9, 16)
    x[0, 0] = 0
    done = rounding(text, x)[4]
    assert set(done.values) == {"w1", "w2", "w2b"}
    assert all(np.isfinite(values).all() for values in done.values.values())


def test_layers_of_half_precision():
    text = """g (float16[N,16] x) => (float16[N,16] y) <float16[16,16] w1, float16[16,16] w2> {
        h = MatMul(x, w1)
        r = Relu(h)
        y = MatMul(r, w2)
    }"""
    x = (rows(12, 16) * 0.2 + rows(12, 1, seed=1)).astype(np.float16)
    _, plan, _, scales, done = rounding(text, x, opset=19)
    assert {values.dtype for values in done.values.values()} == {np.dtype(np.float16)}
    for site in plan.sites:
        if site.weight:
            integers = done.values[site.tensor].astype(float) / scales.of(site).astype(float)
            np.testing.assert_allclose(integers, np.rint(integers), atol=0.07)


def test_weights_listed_as_graph_inputs():
    proto = model(NET)
    for tensor in proto.graph.initializer:
        value = proto.graph.input.add(name=tensor.name)
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add(dim_value=size)
    assert set(rounding(proto, alike(9))[4].values) == {"w1", "w2", "w3", "w4"}


def test_weights_in_a_file_beside_the_model(tmp_path):
    onnx.save(model(NET), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    x = alike(9)
    plain = qdq_surgeon.quantize(model(NET), {"x": x}, gptq=True, compare=False)
    ours = qdq_surgeon.quantize(tmp_path / "m.onnx", {"x": x}, gptq=True, compare=False)
    assert ours.rounding.kept == plain.rounding.kept
    qdq_surgeon.save(ours.model, tmp_path / "q.onnx")
    again = onnx.load(tmp_path / "q.onnx")
    for name in ("w1", "w4"):
        np.testing.assert_array_equal(weight(again, name), weight(plain.model, name))


def test_the_result_holds_the_rounded_weights_and_a_corrected_bias():
    x = alike(32)
    result = qdq_surgeon.quantize(model(NET), {"x": x}, gptq=True, method="max", compare=False)
    assert result.rounding.kept
    for name, values in result.rounding.weights.items():
        np.testing.assert_array_equal(weight(result.model, name), values)
    assert result.rounding in result.refinements
    assert str(result.rounding) in str(result)


def test_it_is_deterministic_and_touches_nothing_else():
    x = alike(12)
    proto = model(NET)
    before = proto.SerializeToString()
    first, second = (qdq_surgeon.quantize(proto, {"x": x}, gptq=True, compare=False).model for _ in range(2))
    assert first == second
    assert proto.SerializeToString() == before


def test_numbers_of_the_model_that_is_written_are_those_promised():
    """The rounding's `after` is the SQNR of the model with these weights, before the biases are corrected."""
    x = alike(24)
    result = qdq_surgeon.quantize(model(NET), {"x": x}, gptq=True, bias_correction=False)
    plain = qdq_surgeon.quantize(model(NET), {"x": x}, bias_correction=False)
    assert result.rounding.kept
    assert result.comparison.sqnr > plain.comparison.sqnr
