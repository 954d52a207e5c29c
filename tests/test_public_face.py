"""The public face: names that are imported when they are first asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import minirl
from minirl.loop.train import train
from minirl.loop.trial import evaluate_run
from minirl.recipe import load
from minirl.tasks import Task


def test_each_name_is_there_and_is_the_one_of_its_module() -> None:
    assert (minirl.train, minirl.evaluate_run) == (train, evaluate_run)
    assert (minirl.load_recipe, minirl.Task) == (load, Task)
    assert all(callable(getattr(minirl, name)) for name in minirl.__all__)
    assert set(minirl.__all__) <= set(dir(minirl))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'minirl' has no attribute 'tarin'"):
        minirl.tarin  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import minirl.loop.train; "])
def test_train_is_a_function_whatever_was_imported_before(first: str) -> None:
    """Catches: a module of the same name that an import puts in the function's place."""
    code = first + (
        "import minirl; from minirl import train; import minirl.loop.train; "
        "print(train.__qualname__, minirl.train is train)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "train True\n"


def test_asking_for_a_light_name_imports_no_torch() -> None:
    code = (
        "import sys; from minirl import Problem, Talk, Task, Verdict, load_recipe; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
