"""Every command and every program in the README runs, in a folder that looks like a clone."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLS = re.compile(r"^pip install \S+ && ")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


PROGRAM = next(block for block in blocks("python") if not block.startswith("# "))
SCRIPTS = [block for block in blocks("python") if block.startswith("# ")]
COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the example in its place, a model of the reader's own, and the README's placement file."""
    folder = tmp_path_factory.mktemp("clone")
    models = ROOT / "tests" / "models"
    shutil.copytree(models, folder / "tests" / "models")
    shutil.copy(models / "digits.onnx", folder / "model.onnx")
    shutil.copy(models / "digits_calibration.npz", folder / "calibration.npz")
    for block in (*blocks("toml"), *SCRIPTS):
        name = block.split(maxsplit=2)[1]
        (folder / name).write_text(block, encoding="utf-8")
    save_images(folder / "images")
    return folder


def save_images(folder):
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'qdq-surgeon[images]'")
    folder.mkdir()
    samples = np.load(ROOT / "tests" / "models" / "digits_calibration.npz")["image"][:32]
    for index, image in enumerate(samples):
        pillow.fromarray((image[0] * 255).astype(np.uint8)).save(folder / f"{index:02}.png")


def run(command, folder):
    words = shlex.split(INSTALLS.sub("", command))
    program = str(Path(sys.executable).with_name(words[0]))
    return subprocess.run([program, *words[1:]], cwd=folder, capture_output=True, text=True)


def needs_engines():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")


NEEDS_ENGINES = ("--engine", "qdq-surgeon audit", "qdq-surgeon build")


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.endswith("pytest")])
def test_each_command_ends_well(command, clone):
    if any(words in command for words in NEEDS_ENGINES):
        needs_engines()
    done = run(command, clone)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_command_prints_what_the_readme_shows(clone):
    shown = [line.split()[0] for line in blocks("text")[0].splitlines()]
    printed = [line.split()[0] for line in run(COMMANDS[0], clone).stdout.splitlines()]
    assert printed == shown


def test_the_story_of_one_node_is_the_one_in_the_readme(clone):
    story = run("qdq-insert tests/models/digits.onnx --plan --explain node_add_35", clone).stdout
    assert story.startswith(blocks("text")[1])


def test_a_target_keeps_in_float_what_the_readme_shows(clone):
    command = next(command for command in COMMANDS if "--target-sqnr" in command)
    assert run(command, clone).stdout.splitlines()[2:4] == blocks("text")[2].splitlines()


def test_the_audit_says_what_the_readme_shows(clone):
    needs_engines()
    run(COMMANDS[0], clone)
    printed = run("qdq-surgeon audit digits.qdq.onnx --no-float", clone).stdout.splitlines()
    assert printed[1:4] == blocks("text")[3].splitlines()[1:]


def test_the_program_runs(clone):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (clone / "digits.qdq.onnx").exists()


def test_the_placement_of_ones_own_keeps_the_first_conv_in_float(clone):
    done = run("qdq-insert tests/models/digits.onnx --plan --placement mine.toml", clone)
    assert "first-conv-in-float" in done.stdout.split("kept float\n")[1]


def test_every_preset_is_in_the_table():
    from qdq_surgeon.rules.placement import presets

    assert [name for name in presets() if f"`{name}`" not in README] == []


def test_every_file_that_the_readme_links_to_is_there():
    assert [link for link in re.findall(r"\]\(([A-Z]+\.md)\)", README) if not (ROOT / link).exists()] == []
