"""A user's Python scripts: data by Polygraphy's convention (`load_data()` yields one mapping per batch), and scores."""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest

DEFAULT_FUNCTION = "load_data"
DEFAULT_SCORE = "score"
_SCRIPT = re.compile(r"(?P<path>.+\.py)(:(?P<function>\w+))?", re.DOTALL)
_END = object()


def script_file(text: str | Path) -> Path | None:
    """The file that 'loader.py' or 'loader.py:function' names; None for what names no script."""
    match = _SCRIPT.fullmatch(str(text))
    return Path(match["path"]) if match else None


@dataclass(frozen=True)
class ScriptScore:
    """A script's function that measures a model. Raises DataError for whatever goes wrong in it, with its line."""

    path: Path
    function: Callable[[Any], float]

    def __call__(self, run: Any) -> float:
        with _running(self.path):
            return self.function(run)


def script_score(script: str | Path) -> ScriptScore:
    """The function that a script measures a model by: `score(run)`, or `my_func` where 'score.py:my_func' is given.

    Raises DataError for whatever goes wrong in the script, with its line.
    """
    path, function = _named(script, DEFAULT_SCORE)
    with _running(path):
        defined = _defined(path, function, "Write one that takes `run` and returns a number, higher is better")
    return ScriptScore(path, defined)


def script_data(script: str | Path) -> Iterable[Mapping[str, Any]]:
    """The batches that a script makes: `load_data()`, or `my_func()` where 'loader.py:my_func' is given.

    The script runs when the first batch is asked for, and makes each when its turn comes; it may import the modules
    beside it. Raises DataError, at once where there is no such file, and while reading for whatever goes wrong in the
    script, with its line.
    """
    return _items(*_named(script, DEFAULT_FUNCTION))


def _named(script: str | Path, function: str) -> tuple[Path, str]:
    """The file and the function that a text names."""
    match = _SCRIPT.fullmatch(str(script))
    if not match:
        raise DataError(f"{script} is no Python script: give a path that ends in .py, or in .py:function")
    path = Path(match["path"])
    if not path.is_file():
        raise DataError(f"{path}: no such script")
    return path, match["function"] or function


def _items(path: Path, name: str) -> Iterator[Any]:
    with _running(path):
        items = iter(_loaded(path, name))
    while True:
        with _running(path):
            item = next(items, _END)
        if item is _END:
            return
        yield item


def _loaded(path: Path, name: str) -> Iterable[Any]:
    items = _defined(path, name, "Write one that yields the batches")()
    if isinstance(items, (Mapping, str)) or not isinstance(items, Iterable):
        kind = type(items).__name__
        raise DataError(f"{path}: {name}() returns a {kind}: yield one mapping of input names to arrays per batch")
    return items


def _defined(path: Path, name: str, advice: str) -> Callable[..., Any]:
    defined = runpy.run_path(str(path), run_name=path.stem)
    function = defined.get(name)
    if not callable(function):
        functions = [key for key, value in defined.items() if callable(value)]
        raise DataError(f"{path} has no function '{name}'.{nearest(name, functions)} {advice}")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """The script's own code runs inside: modules beside it can be imported, and its errors are told with their line."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}{_line(error, path)}: {reason}") from error
    finally:
        with contextlib.suppress(ValueError):  # the script may have taken it out
            sys.path.remove(folder)


def _line(error: BaseException, path: Path) -> str:
    """', line 3': the last one of the script on the way to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""
