"""One's own code in a recipe: `my_file.py:my_function` names a method or makes a task.

To run or evaluate a recipe with such a name runs that file: read a stranger's file before you run
his recipe. Nothing is fetched, a name without its file does nothing, and neither reading a recipe
nor `minirl report` runs any file.

Invariant: in a recipe that was read, names are absolute; in a run's folder they are the names of
copies beside its recipe.yaml, so that the folder can be moved, and shows what it was made with.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from minirl.errors import UserError

OWN = "own"
"""The name of what Python gives: `train(recipe, folder, method=..., task=...)`."""
_given: ContextVar[Callable[..., Any] | None] = ContextVar("given", default=None)
_NAME = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    """Whether a name is that of one's own code, in a file or given in Python."""
    return name == OWN or _NAME.fullmatch(name) is not None


def file_of(name: str) -> Path | None:
    """The file of a name `my_file.py:my_function`; None for another name."""
    found = _NAME.fullmatch(name)
    return None if found is None else Path(found["path"])


def label_of(name: str) -> str:
    """A name without its file."""
    return name if file_of(name) is None else name.rpartition(":")[2]


def absolute(name: str, folder: Path) -> str:
    """A name whose file is looked for in `folder`, the recipe's."""
    path = file_of(name)
    if path is None:
        return name
    return f"{(folder / path.expanduser()).absolute()}:{label_of(name)}"


def beside(name: str) -> str:
    """A name whose file is a copy in a run's folder."""
    path = file_of(name)
    return name if path is None else f"{path.name}:{label_of(name)}"


def give(method: Callable[..., Any] | None) -> None:
    """Hand over the method that `own` means from now on, until the next run or evaluation."""
    _given.set(method)


def load_function(name: str, where: str) -> Callable[..., Any]:
    """The function that an own name means. Raises UserError for a file that is not there or does
    not import, for a function that it does not have, and if none was given in Python."""
    path, function = file_of(name), label_of(name)
    if path is None:
        if (given := _given.get()) is not None:
            return given
        raise UserError(
            f"{where}: got 'own', which is given in Python; expected it as method=my_method of"
            " minirl.train or minirl.evaluate_run"
        )
    try:
        module = _load(path, path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{where}: no file {path} ({error.strerror}); expected it in the recipe's folder, or"
            " with its whole path"
        ) from error
    except Exception as error:  # somebody else's code; its traceback stands behind the message
        raise UserError(
            f"{where}: {path} does not import ({type(error).__name__}: {error}); run it with"
            " `python` to see where"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if _is_from(value, module)]
        raise UserError(
            f"{where}: {path} has no function {function!r}, expected one of"
            f" {', '.join(own) or 'its functions, but it has none'}"
        )
    return found  # type: ignore[no-any-return]


def copies(names: Iterator[str]) -> dict[str, Path]:
    """File name in a run's folder -> the file that is copied there. Raises UserError for two files
    of one name."""
    found: dict[str, Path] = {}
    for path in filter(None, map(file_of, names)):
        if found.setdefault(path.name, path) != path:
            raise UserError(
                f"recipe: got two files {path.name} ({found[path.name]} and {path}), expected files"
                " with different names: the run's folder keeps a copy of each"
            )
    return found


class _Loader(SourceFileLoader):
    """Leaves no bytecode behind: the folder may be a run's."""

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        pass


@cache
def _load(path: Path, content: bytes) -> ModuleType:
    """A module a file and content: a method and a task of one file share it, an edited one is read
    again."""
    name = f"minirl_own_{path.stem}_{abs(hash((path, content))):x}"
    spec = spec_from_loader(name, _Loader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _is_from(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
