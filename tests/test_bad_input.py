"""Bad input, row by row of the README's table: exit code, one line, nothing half-written, the input untouched."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qdq_surgeon
from qdq_surgeon.cli import insert_main
from tests.graphs import model

README = Path(__file__).parent.parent / "README.md"
TEXT = """g (float[N,3,8,8] x) => (float[N,32] y) <float[192,32] w> {
    f = Flatten(x)
    r = Relu(f)
    y = MatMul(r, w)
}"""
ROW = re.compile(r"^\| (?P<given>[^|]+?) \| (?P<code>\d+) \| (?:`(?P<line>.*)`|\(.*\)) \|$", re.MULTILINE)


def rows(kind: Callable[[str], bool]) -> list:
    """The rows of the README's table: what is given, the exit code, how the line begins."""
    section = README.read_text(encoding="utf-8").split("### When something is wrong")[1].split("\n## ")[0]
    found = [(row["given"], int(row["code"]), row["line"]) for row in ROW.finditer(section)]
    return [pytest.param(*row, id=row[0]) for row in found if kind(row[0])]


# ---- what is given ------------------------------------------------------------------------------------------------


def missing() -> None:
    Path("model.onnx").unlink()


def folder() -> None:
    Path("model.onnx").unlink()
    Path("model.onnx").mkdir()


def cut_off() -> None:
    Path("model.onnx").write_bytes(Path("model.onnx").read_bytes()[:-300])


def damaged() -> None:
    data = bytearray(Path("model.onnx").read_bytes())
    data[2:12] = b"\xff" * 10
    Path("model.onnx").write_bytes(data)


def text_file() -> None:
    Path("model.onnx").write_text("This is not a model.\n")


def empty() -> None:
    Path("model.onnx").write_bytes(b"")


def cycle() -> None:
    proto = model(TEXT)
    proto.graph.node[0].input[0] = "r"
    onnx.save(proto, "model.onnx")


def unknown_op() -> None:
    proto = model(TEXT)
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    onnx.save(proto, "model.onnx")


def operator_form() -> None:
    text = """g (uint8[N,4] x) => (uint8[N,4] y) <float s = {0.5}, uint8 z = {0}, uint8[4,4] w> {
        y = QLinearMatMul(x, s, z, w, s, z, s, z)
    }"""
    onnx.save(model(text), "model.onnx")


def absurd() -> None:
    proto = model(TEXT)
    proto.graph.initializer[0].dims[:] = [192, 1 << 40]
    onnx.save(proto, "model.onnx")


def outside(**entries: object) -> None:
    """The weight in a file of its own, with one thing said wrongly of it."""
    proto = model(TEXT)
    tensor = proto.graph.initializer[0]
    Path("weights").write_bytes(tensor.raw_data)
    said = {"location": "weights", "offset": 0, "length": len(tensor.raw_data)} | entries
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in said.items():
        tensor.external_data.add(key=key, value=str(value))
    Path("model.onnx").write_bytes(proto.SerializeToString())


def no_external_data() -> None:
    outside()
    Path("weights").unlink()


def external_link() -> None:
    outside()
    Path("weights").rename("../weights")
    Path("weights").symlink_to("../weights")


def small_external_data() -> None:
    outside()
    proto = onnx.load("model.onnx", load_external_data=False)
    proto.graph.initializer[0].dims[:] = [192, 1 << 40]
    Path("model.onnx").write_bytes(proto.SerializeToString())


def data(change: Callable[[np.ndarray], np.ndarray], name: str = "x") -> Callable[[], None]:
    return lambda: np.savez("data.npz", **{name: change(images())})


def hard_link() -> None:
    os.link("model.onnx", "link.onnx")


GIVEN: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a model that is not there": (missing, []),
    "a folder in the model's place": (folder, []),
    "a model that is cut off": (cut_off, []),
    "a model with damaged bytes": (damaged, []),
    "a text file": (text_file, []),
    "an empty file": (empty, []),
    "a graph with a cycle": (cycle, []),
    "an operator that nobody knows": (unknown_op, []),
    "a model quantized in operator form": (operator_form, []),
    "a tensor larger than its data": (absurd, []),
    "external data that are missing": (no_external_data, []),
    "external data in another folder": (lambda: outside(location="../weights"), []),
    "external data with an absolute path": (lambda: outside(location="/etc/passwd"), []),
    "external data behind a link that leads out": (external_link, []),
    "external data before the file's beginning": (lambda: outside(offset=-4), []),
    "external data beyond the file's end": (lambda: outside(offset=4096), []),
    "external data smaller than the tensor": (small_external_data, []),
    "data of another name": (data(lambda x: x, "image"), []),
    "data of another shape": (data(lambda x: x[:, :2]), []),
    "data of another type": (data(lambda x: x.astype(complex)), []),
    "data with NaN": (data(lambda x: np.where(x > 2, np.nan, x)), []),
    "data without samples": (data(lambda x: x[:0]), []),
    "an output folder that is not there": (lambda: None, ["-o", "nowhere/out.onnx"]),
    "an output folder that takes nothing": (lambda: Path("locked").mkdir(mode=0o555), ["-o", "locked/out.onnx"]),
    "a full disk": (lambda: None, ["-o", "/dev/full"]),
    "an output that is the input": (lambda: None, ["-o", "model.onnx"]),
    "an output that links to the input": (hard_link, ["-o", "link.onnx"]),
    "an output in the place of the input's weights": (lambda: outside(), ["-o", "weights"]),
    "a report in the place of the input's weights": (lambda: outside(), ["--json", "weights"]),
    "an output whose weights would overwrite the input's": (
        lambda: (outside(location="out.onnx.data"), Path("weights").rename("out.onnx.data")),
        ["-o", "out.onnx", "--external-data"],
    ),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in a folder, with a model and 20 samples for it."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    onnx.save(model(TEXT), "model.onnx")
    np.savez("data.npz", x=images())
    return tmp_path


@pytest.mark.parametrize(("given", "code", "line"), rows(lambda given: given in GIVEN))
def test_bad_input(given, code, line, place, capsys, monkeypatch):
    make, arguments = GIVEN[given]
    if given == "a full disk" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    if given == "an output folder that takes nothing" and os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "locked")  # root may write everywhere
    make()
    before = contents(place)
    assert insert_main(["model.onnx", "--data", "data.npz", *arguments]) == code
    *others, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"qdq-insert: {line}")
    assert others == []
    assert contents(place) == before


def test_the_table_has_a_row_for_every_case():
    given = {row.values[0] for row in rows(lambda _: True)}
    assert given == {*GIVEN, *INTERRUPTED, TWO_RUNS}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_bytes_are_damaged_there_is_no_traceback(seed, place, capsys):
    """Flipped, missing or doubled bytes: a clear line, or a model that is sound."""
    chance = random.Random(seed)
    whole = bytearray(model(TEXT.replace("192,32", "192,2").replace("N,32", "N,2")).SerializeToString())
    for _ in range(chance.randrange(1, 6)):
        start = chance.randrange(len(whole) if seed % 2 else 200)
        whole[start : start + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
    Path("model.onnx").write_bytes(whole)
    code = insert_main(["model.onnx", "--plan"])
    errors = capsys.readouterr().err
    assert (code, errors.count("\n")) in ((0, 0), (2, 1))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_model_gives_a_whole_result_or_none(seed, place, capsys):
    """Bytes that changed, in the graph or in the weights, and then the whole command."""
    chance = random.Random(seed)
    whole = bytearray(Path("model.onnx").read_bytes())
    graph = [*range(150), *range(-150, 0)]
    for _ in range(chance.randrange(1, 6)):
        whole[chance.choice([chance.choice(graph), chance.randrange(len(whole))])] ^= 1 << chance.randrange(8)
    Path("model.onnx").write_bytes(whole)
    before = contents(place)
    code = insert_main(["model.onnx", "--data", "data.npz", "--quiet", "-o", "out.onnx"])
    errors = capsys.readouterr().err.splitlines()
    assert code in (0, 2)
    assert "Traceback" not in "".join(errors)
    if code == 0:
        qdq_surgeon.load("out.onnx")
        return
    assert errors[-1].startswith("qdq-insert: error: ")
    assert contents(place) == before


# ---- interrupts -----------------------------------------------------------------------------------------------------

INTERRUPTED = {
    "Ctrl-C while it loads": "qdq_surgeon.model.read_model",
    "Ctrl-C while it plans": "qdq_surgeon.pipeline.make_plan",
    "Ctrl-C while it calibrates": "qdq_surgeon.calibration.collection._pieces",
    "Ctrl-C while it chooses scales": "qdq_surgeon.pipeline.choose_scales",
    "Ctrl-C while it inserts": "qdq_surgeon.making.insert_pairs",
    "Ctrl-C while it compares": "qdq_surgeon.comparison._Measured.add",
    "Ctrl-C while it writes": "qdq_surgeon.storage._bytes",
}
"""The function in which each run is when the signal arrives; in the last, the weights are written already."""

SLEEPER = """
import signal, sys, time
from pkgutil import resolve_name

def sleep(*arguments, **options):
    print("here", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have switched it off
owner, _, function = sys.argv[1].rpartition(".")
setattr(resolve_name(owner), function, sleep)
from qdq_surgeon.cli import insert_main
sys.exit(insert_main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize(("given", "code", "line"), rows(lambda given: given in INTERRUPTED))
def test_an_interrupt(given, code, line, place):
    before = contents(place)
    arguments = ["model.onnx", "--data", "data.npz", "--external-data"]
    with started(SLEEPER, INTERRUPTED[given], *arguments) as child:
        assert "here\n" in iter(child.stdout.readline, "")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors.count("\n")) == (code, 1)
    assert errors.startswith(f"qdq-insert: {line}")
    assert contents(place) == before


# ---- writing --------------------------------------------------------------------------------------------------------

TWO_RUNS = "two runs that write one file"
INSERT = "import sys; from qdq_surgeon.cli import insert_main; sys.exit(insert_main(sys.argv[1:]))"


@pytest.mark.parametrize(("given", "code", "line"), rows(lambda given: given == TWO_RUNS))
def test_two_runs_that_write_one_file(given, code, line, place):
    ways = {"mse": ["--method", "mse"], "max": ["--method", "max"]}
    for name, way in ways.items():
        assert insert_main(["model.onnx", "--data", "data.npz", "--quiet", *way, "-o", f"{name}.onnx"]) == 0
    runs = [started(INSERT, "model.onnx", "--data", "data.npz", *way, "-o", "out.onnx") for way in ways.values()]
    assert [(run.communicate(timeout=60)[1], run.returncode) for run in runs] == [("", code)] * 2
    assert Path("out.onnx").read_bytes() in [Path(f"{name}.onnx").read_bytes() for name in ways]
    assert len(list(Path().iterdir())) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for files")
@pytest.mark.parametrize("external_data", [False, True])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_disk_that_becomes_full_leaves_what_was_there(external_data, there_before, place):
    import resource

    proto = model(TEXT)
    if there_before:
        qdq_surgeon.save(proto, "out.onnx", external_data)
    before = contents(place)
    proto.graph.doc_string = "changed"
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(qdq_surgeon.ModelError, match=r"out.onnx(.data)? cannot be written: File too large"):
            qdq_surgeon.save(proto, "out.onnx", external_data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert contents(place) == before


# ---- helpers --------------------------------------------------------------------------------------------------------


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(README.parent)},
    )  # fmt: skip


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file's bytes and time: nothing added, nothing changed, nothing gone."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
