"""A script's load_data() gives the batches; what goes wrong in it is told with its line."""

import sys
import textwrap
import traceback

import numpy as np
import pytest

from qdq_surgeon.calibration.scripts import script_data
from qdq_surgeon.errors import DataError
from tests.calibration.feeding import OPEN, batches, fed, opened


def written(folder, text, name="loader.py"):
    (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))
    return folder / name


def refused(script):
    with pytest.raises(DataError) as error:
        list(script_data(script))
    assert "\n" not in str(error.value)
    return error.value


ONES_AND_TWOS = """
    import numpy as np

    def load_data():
        for value in (1, 2):
            yield {"x": np.full((1, 3), value, np.float32)}

    def twos():
        return [{"x": np.full((2, 3), 2.0)}]
    """


def test_a_script_gives_the_batches_of_load_data(tmp_path):
    assert fed(OPEN, written(tmp_path, ONES_AND_TWOS), "x").tolist() == [[1, 1, 1], [2, 2, 2]]


def test_another_function_is_named_behind_a_colon(tmp_path):
    path = written(tmp_path, ONES_AND_TWOS)
    assert fed(OPEN, f"{path}:twos", "x").tolist() == [[2, 2, 2]] * 2
    assert [feed["x"].shape for feed in script_data(f"{path}:twos")] == [(2, 3)]


def test_the_function_may_be_private_or_imported(tmp_path):
    written(tmp_path, "def _rows(): return [{'x': [[1.0, 2.0, 3.0]]}]", "rows_beside.py")
    path = written(tmp_path, "from rows_beside import _rows")
    assert fed(OPEN, f"{path}:_rows", "x").tolist() == [[1, 2, 3]]


def test_the_source_is_the_script(tmp_path):
    path = written(tmp_path, ONES_AND_TWOS)
    assert opened(OPEN, f"{path}:twos").source == f"{path}:twos"


def test_a_script_runs_no_earlier_and_no_further_than_its_batches_are_asked_for(tmp_path):
    text = f"""
        from pathlib import Path
        def load_data():
            for index in range(100):
                Path({str(tmp_path)!r}, str(index)).touch()
                yield {{"x": [[0.0, 0.0, 0.0]]}}
        """
    given = opened(OPEN, written(tmp_path, text)).batches
    made = lambda: sum(path.name.isdigit() for path in tmp_path.iterdir())  # noqa: E731
    assert made() == 0
    next(given)
    assert made() == 1
    next(given)
    assert made() == 2


def test_a_script_may_import_what_lies_beside_it_early_and_late(tmp_path):
    written(tmp_path, "VALUE = 3.0", "constants_beside.py")
    written(tmp_path, "def times(x): return x * 2", "functions_beside.py")
    text = """
        from constants_beside import VALUE
        def load_data():
            from functions_beside import times
            yield {"x": [[times(VALUE)] * 3]}
        """
    before = list(sys.path)
    assert fed(OPEN, written(tmp_path, text), "x").tolist() == [[6, 6, 6]]
    assert sys.path == before


def test_a_script_is_no_main_program(tmp_path):
    written(tmp_path, ONES_AND_TWOS + "\n    if __name__ == '__main__':\n        raise SystemExit\n")
    assert len(batches(OPEN, tmp_path / "loader.py")) == 2


def test_a_script_may_define_dataclasses(tmp_path):
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Sample:
            values: list[float]
        def load_data():
            yield {"x": [Sample([1.0, 2.0, 3.0]).values]}
        """
    assert fed(OPEN, written(tmp_path, text), "x").tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def load_data(:\n", "line 1: SyntaxError: "),
        ("x = 1\ndef load_data():\n    return 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("def load_data():\n    yield {}\n    raise KeyError('image')\n", "line 3: KeyError: 'image'"),
        ("import json\ndef load_data():\n    json.loads('[')\n", "line 3: JSONDecodeError: "),
        ("def load_data():\n    raise ValueError('two\\nlines')\n", "line 2: ValueError: two lines"),
        ("def load_data():\n    raise SystemExit('no images')\n", "line 2: SystemExit: no images"),
        ("def load_data(folder):\n    yield {}\n", "TypeError: load_data\\(\\) missing 1 required positional argument"),
        ("def load_dat():\n    yield {}\n", "has no function 'load_data'. Did you mean 'load_dat'"),
        ("def load_data():\n    return 7\n", r"load_data\(\) returns a int: yield one mapping"),
        ("def load_data():\n    pass\n", r"load_data\(\) returns a NoneType: yield one mapping"),
        ("def load_data():\n    return {'x': [1]}\n", r"load_data\(\) returns a dict: yield one mapping"),
    ],
)
def test_what_goes_wrong_in_a_script_is_told_with_file_and_line(text, message, tmp_path):
    error = refused(written(tmp_path, text))
    assert str(error).startswith(str(tmp_path / "loader.py"))
    with pytest.raises(DataError, match=message):
        raise error


def test_the_original_error_of_a_script_comes_along(tmp_path):
    error = refused(written(tmp_path, "def load_data():\n    raise KeyError('image')\n"))
    assert isinstance(error.__cause__, KeyError)
    assert any(
        frame.filename == str(tmp_path / "loader.py") for frame in traceback.extract_tb(error.__cause__.__traceback__)
    )


def test_an_interrupt_passes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        list(script_data(written(tmp_path, "raise KeyboardInterrupt\n")))


def test_what_does_not_fit_is_told_with_the_script_and_the_batch(tmp_path):
    path = written(tmp_path, "def load_data():\n    yield {'x': [[1.0, 2.0]]}\n")
    with pytest.raises(DataError, match=r"loader\.py, batch 0: 'x' has shape \[1, 2\], but the model wants \[N, 3\]"):
        batches(OPEN, path)


@pytest.mark.parametrize("script", ["nowhere.py", "nowhere.py:load"])
def test_a_script_that_is_not_there_is_named_at_once(script):
    with pytest.raises(DataError, match=r"nowhere\.py: no such script"):
        opened(OPEN, script)


def test_what_does_not_end_in_py_is_no_script(tmp_path):
    with pytest.raises(DataError, match=r"is no Python script: give a path that ends in \.py"):
        script_data(tmp_path / "loader.txt")


def test_no_script_in_a_folder_is_ever_run(tmp_path):
    written(tmp_path, "raise SystemExit")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    assert len(batches(OPEN, tmp_path)) == 1
