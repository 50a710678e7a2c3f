"""`qdq-surgeon calibrate` and `merge`, and `qdq-insert --stats`: what users type, and what they get wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qdq_surgeon.calibration.statistics import Statistics
from qdq_surgeon.cli import insert_main, main

MODELS = Path(__file__).parent / "models"
MODEL = str(MODELS / "digits.onnx")
DATA = ["--data", str(MODELS / "digits_calibration.npz")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calibrated(*options, output="all.npz"):
    assert main(["calibrate", MODEL, *DATA, *options, "-o", output, "--quiet"]) == 0
    return Statistics.load(output)


def test_shards_merged_in_any_order_give_one_file_and_the_ranges_of_the_whole(folder):
    whole = calibrated()
    for part in ("1/3", "2/3", "3/3"):
        calibrated("--shard", part, output=f"{part[0]}.npz")
    for order in ("123", "312"):
        assert main(["merge", *(f"{part}.npz" for part in order), "-o", f"{order}.npz", "--quiet"]) == 0
    assert Path("123.npz").read_bytes() == Path("312.npz").read_bytes()
    together = Statistics.load("123.npz")
    assert (together.origin.samples, together.origin.digest) == (whole.origin.samples, whole.origin.digest)
    for name, statistic in whole.tensors.items():
        np.testing.assert_array_equal(together.tensors[name].histogram, statistic.histogram)
        assert together.tensors[name].maximum == statistic.maximum


def test_stats_take_the_place_of_a_calibration_for_every_method(folder, capsys):
    calibrated()
    for method in ("mse", "entropy", "percentile:99.9", "max"):
        assert insert_main([MODEL, "--stats", "all.npz", "--method", method, "-o", "out.onnx"]) == 0
        out = capsys.readouterr().out
        assert f"calibrated by {method} on 256 samples" in out
        assert "no comparison" in out


def test_data_beside_stats_are_compared_on_and_said_to_be_known_where_they_are(folder, capsys):
    calibrated()
    assert insert_main([MODEL, "--stats", "all.npz", *DATA, "-o", "out.onnx"]) == 0
    assert "digits_calibration.npz, used for calibration too" in capsys.readouterr().out
    other = str(MODELS / "digits_test.npz")
    assert insert_main([MODEL, "--stats", "all.npz", "--data", other, "-o", "out.onnx"]) == 0
    assert "digits_test.npz\n" in capsys.readouterr().out


BAD = {
    "stats and samples": (insert_main, ["--stats", "all.npz", "--samples", "3"], "which --stats replaces"),
    "stats and a provider": (insert_main, ["--stats", "all.npz", "--provider", "cuda"], "which --stats replaces"),
    "stats and FP16 without data": (insert_main, ["--stats", "all.npz", "--float16"], "give --data too"),
    "stats and a gate without data": (insert_main, ["--stats", "all.npz", "--min-sqnr", "9"], "need data to compare"),
    "no such stats": (insert_main, ["--stats", "none.npz"], "none.npz: no such file of statistics"),
    "stats that are none": (insert_main, ["--stats", DATA[1]], "holds no statistics"),
    "ranges only for mse": (insert_main, ["--stats", "ranges.npz"], "hold ranges only"),
    "unknown provider": (insert_main, [*DATA, "--provider", "gpu"], "unknown provider 'gpu'. Did you mean 'cpu'?"),
    "absent provider": (insert_main, [*DATA, "--provider", "cuda"], "no cuda provider"),
    "memory without unit": (insert_main, [*DATA, "--memory", "3"], "such as 512M"),
    "two kinds of data": (insert_main, [*DATA, "--data-loader-script", "load.py"], "both give data"),
    "preprocessing alone": (insert_main, ["--preprocess", "images.toml"], "--preprocess goes with --data"),
    "resume without output": ("calibrate", [*DATA, "--resume"], "--resume goes with -o"),
    "shard beyond": ("calibrate", [*DATA, "--shard", "3/2"], "such as 2/8"),
    "output that is the script": ("calibrate", ["--data", "load.py", "-o", "load.py"], "is the input itself"),
    "output that is the script of a function": ("calibrate", ["--data", "load.py:f", "-o", "load.py"], "input itself"),
    "output that is the loader": ("calibrate", ["--data-loader-script", "load.py", "-o", "load.py"], "input itself"),
    "output among the data": ("calibrate", ["--data", "arrays", "-o", "arrays/s.npz"], "would lie among the data"),
}


@pytest.mark.parametrize(("command", "options", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_answered_in_one_line(command, options, message, folder, capsys):
    calibrated()
    calibrated("--ranges-only", output="ranges.npz")
    Path("load.py").write_text("def load_data():\n    yield {}\n", encoding="utf-8")
    Path("arrays").mkdir()
    before = listed()
    code = exit_code(command, options)
    error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert message in error[-1]
    assert listed() == before
    assert "load_data" in Path("load.py").read_text(encoding="utf-8")


def test_kinds_are_not_merged_and_no_part_twice(folder, capsys):
    calibrated("--shard", "1/2")
    calibrated("--shard", "2/2", "--ranges-only", output="ranges.npz")
    assert main(["merge", "all.npz", "ranges.npz", "-o", "out.npz"]) == 2
    assert "some of these statistics hold ranges only" in capsys.readouterr().err
    assert main(["merge", "all.npz", "all.npz", "-o", "out.npz"]) == 2
    assert "merge each part once" in capsys.readouterr().err
    assert not Path("out.npz").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_says_how_to_go_on_and_ends_in_the_bytes_of_a_whole_one(number, folder):
    Path("slow.py").write_text(
        "import time\nimport numpy as np\n\n\ndef load_data():\n"
        "    for seed in range(24):\n"
        "        print('batch', flush=True)\n        time.sleep(0.1)\n"
        "        yield {'image': np.random.default_rng(seed).random((4, 1, 8, 8), np.float32)}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-c", "import sys; from qdq_surgeon.cli import main; sys.exit(main())", "calibrate"]
    command += [MODEL, "--data", "slow.py", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [*command, "-o", "part.npz"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell's background jobs ignore Ctrl-C, and so would the child of tests that run in one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(6):
        child.stdout.readline()
    time.sleep(0.05)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert (child.returncode, error.splitlines()[-1].endswith("interrupted, go on with --resume")) == (130, True)
    assert listed() == ["part.npz.partial", "slow.py"]
    for options in (["-o", "part.npz", "--resume"], ["-o", "whole.npz"]):
        subprocess.run([*command, *options], check=True, capture_output=True, env=environment)
    assert Path("part.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert listed() == ["part.npz", "slow.py", "whole.npz"]


def listed():
    return sorted(path.name for path in Path().iterdir())


def exit_code(command, options):
    try:
        return main([command, MODEL, *options]) if isinstance(command, str) else command([MODEL, *options])
    except SystemExit as ended:
        return ended.code
