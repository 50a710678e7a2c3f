"""The wheel holds the package and its placement files, and nothing of theirs lands beside it."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What is in a wheel built from a copy of the sources, so that no build folder is left in them."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("qdq_surgeon", "patterns"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr + built.stdout
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_every_placement_file_ships_inside_the_package(names):
    sources = sorted(path.relative_to(ROOT / "patterns").as_posix() for path in (ROOT / "patterns").rglob("*.toml"))
    shipped = sorted(name.removeprefix("qdq_surgeon/patterns/") for name in names if name.endswith(".toml"))
    assert shipped == sources


def test_every_module_ships(names):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qdq_surgeon").rglob("*.py")}
    assert sources <= set(names)


def test_nothing_lands_beside_the_package(names):
    assert {name.split("/")[0] for name in names} == {"qdq_surgeon", f"qdq_surgeon-{_version()}.dist-info"}


def test_types_and_licence_ship(names):
    assert "qdq_surgeon/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


def _version():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
