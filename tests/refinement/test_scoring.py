"""A user's own measure: what it is given, what it may return, and where it counts."""

from pathlib import Path

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.calibration.scripts import script_score
from qdq_surgeon.errors import DataError
from qdq_surgeon.refinement.scoring import scored
from tests.graphs import model
from tests.refinement.nets import OUTPUTS, prepared, rows, run

NET = """g (float[N,16] x) => (float[N,32] y) <float[16,64] w, float[64] b, float[64,32] v> {
    c = Gemm(x, w, b)
    r = Relu(c)
    y = Gemm(r, v)
}"""
X = rows(40, 16)


def script(tmp_path, text, name="score.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


# ---- what a score is given ----------------------------------------------------------------------------------------


def test_a_run_takes_arrays_by_name_and_gives_outputs_by_name():
    x = rows(4, 16, 8, 8)
    _, _, quantized = prepared(OUTPUTS, x)
    seen = {}

    def score(run):
        seen.update(run({"x": x}))
        return 0

    scored(score, quantized)
    expected = run(quantized, {"x": x}, simulate=True)
    assert seen.keys() == expected.keys() == {"r", "y", "p"}
    for name, array in expected.items():
        np.testing.assert_array_equal(seen[name], array)


@pytest.mark.parametrize(
    "given",
    [
        np.float64,
        np.ndarray.tolist,
    ],
)
def test_a_run_takes_what_numpy_makes_an_array_of(given):
    x = rows(2, 16)
    expected = run(model(NET), {"x": x})["y"].sum()
    assert scored(lambda run: run({"x": given(x)})["y"].sum(), model(NET)) == expected


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.25), np.array(3.0), "0.5"])
def test_whatever_is_a_number_is_a_score(value):
    assert scored(lambda run: value, model(NET)) == float(value)


@pytest.mark.parametrize("value", [None, "good", [1, 2], {"map": 1}, np.ones(3), 1j])
def test_a_score_that_is_no_number(value):
    with pytest.raises(DataError, match="which is no number: return one") as error:
        scored(lambda run: value, model(NET))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf])
def test_a_score_that_is_not_finite(value):
    with pytest.raises(DataError, match="return a finite number"):
        scored(lambda run: value, model(NET))


@pytest.mark.parametrize("feed", [{}, {"z": X}, {"x": X[:, :3]}, {"x": X, "z": X}])
def test_a_feed_that_does_not_fit_is_one_line(feed):
    with pytest.raises(DataError) as error:
        scored(lambda run: run(feed), model(NET))
    assert "\n" not in str(error.value)


def test_an_error_in_the_users_own_function_is_the_users():
    with pytest.raises(ZeroDivisionError):
        scored(lambda run: 1 / 0, model(NET))


# ---- from a script ------------------------------------------------------------------------------------------------


def test_a_script_scores_by_its_function_score_or_another(tmp_path):
    path = script(tmp_path, "def score(run):\n    return 1\n\ndef other(run):\n    return 2\n")
    assert scored(script_score(path), model(NET)) == 1
    assert scored(script_score(f"{path}:other"), model(NET)) == 2


def test_a_script_may_import_the_modules_beside_it(tmp_path):
    script(tmp_path, "VALUE = 7\n", "beside_the_score.py")
    late = "def score(run):\n    from beside_the_score import VALUE\n    return VALUE\n"
    assert scored(script_score(script(tmp_path, late)), model(NET)) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(run):\n    x = 1\n    return 1 / 0\n", "score.py, line 3: ZeroDivisionError: division by zero"),
        ("import nothing_like_it\n", "score.py, line 1: ModuleNotFoundError"),
        ("def score(run:\n", "score.py, line 1: SyntaxError"),
        (
            "def scores(run):\n    return 1\n",
            "has no function 'score'. Did you mean 'scores'? Write one that takes `run`",
        ),
        ("score = 3\n", "has no function 'score'"),
        ("raise SystemExit(3)\n", "score.py, line 1: SystemExit"),
        ("def score():\n    return 1\n", "TypeError"),
        ("def score(run):\n    return run({'x': [[1.0]]})['y']\n", "onnxruntime cannot run the model"),
        ("def score(run):\n    return 'good'\n", "is 'good', which is no number"),
        ("def score(run):\n    return float('nan')\n", "the score is nan"),
    ],
)
def test_what_goes_wrong_in_a_script_is_one_line(tmp_path, text, words):
    with pytest.raises(DataError) as error:
        scored(script_score(script(tmp_path, text)), model(NET))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.py", "score.txt", "score"])
def test_what_is_no_script(tmp_path, name):
    with pytest.raises(DataError, match=r"no such script|is no Python script"):
        script_score(tmp_path / name)


def test_a_script_is_run_once_for_all_models(tmp_path):
    path = script(
        tmp_path,
        "import pathlib\nwith open(__file__ + '.log', 'a') as f: f.write('x')\ndef score(run):\n    return 1\n",
    )
    score = script_score(path)
    for _ in range(3):
        scored(score, model(NET))
    assert Path(f"{path}.log").read_text() == "x"


# ---- in the line --------------------------------------------------------------------------------------------------


def own_measure(run):
    """How near a model is to the float one, as the user would see it: 1 is equal."""
    expected = own_measure.expected
    actual = run({"x": X})["y"]
    return 1 - float(np.square(expected - actual).sum() / np.square(expected).sum())


own_measure.expected = run(model(NET), {"x": X})["y"]


def test_both_models_are_scored_in_the_comparison():
    result = qdq_surgeon.quantize(model(NET), {"x": X}, score=own_measure)
    floats, quantized = result.comparison.scores
    assert floats == pytest.approx(1)
    assert quantized == pytest.approx(scored(own_measure, result.model))
    assert 0.9 < quantized < 1
    assert f"score: float {floats:.6g}, INT8 {quantized:.6g}" in str(result.comparison)


def test_without_a_score_there_are_none():
    assert qdq_surgeon.quantize(model(NET), {"x": X}).comparison.scores is None


def test_a_target_score_is_reached_with_as_little_as_it_takes():
    plain = qdq_surgeon.quantize(model(NET), {"x": X}, method="percentile:95", score=own_measure)
    aim = (1 + plain.comparison.scores[1]) / 2
    result = qdq_surgeon.quantize(model(NET), {"x": X}, method="percentile:95", score=own_measure, target_score=aim)
    assert result.comparison.scores[1] >= aim
    assert result.mixed.reached
    assert [op.output for op in result.mixed.ops] in (["c"], ["y"])
    assert f"to reach score {aim:g}" in str(result)


def test_a_target_score_without_a_score_is_refused():
    with pytest.raises(qdq_surgeon.QdqError):
        qdq_surgeon.quantize(model(NET), {"x": X}, target_score=0.9)
