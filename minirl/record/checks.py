"""What a run folder must hold, or not, before a run is opened in it.

Invariant: a folder that is refused is left as it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import minirl
from minirl import recipe as recipes
from minirl.errors import UserError
from minirl.io.files import read_rows, write_rows
from minirl.recipe.own import beside

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def refuse_foreign(folder: Path) -> None:
    """Raise UserError for a file, and for a folder of other things than a run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder; name another with --out")
    if not folder.exists() or (folder / "recipe.yaml").exists():
        return
    # A run killed before it wrote its recipe leaves its lock and temporary files only.
    strange = sorted(
        path.name for path in folder.iterdir() if path.name != ".lock" and not path.match(".*.tmp")
    )
    if strange:
        raise UserError(
            f"{folder}: holds {strange[0]!r} but no recipe.yaml, so it is not a run; name a new or"
            " empty folder with --out"
        )


def check_recipe(folder: Path, recipe: recipes.Recipe) -> None:
    """Raise UserError unless the folder's recipe, if there is one, is this one."""
    if not (folder / "recipe.yaml").exists():
        return
    advice = "name another folder with --out or delete this one"
    try:
        stored = recipes.load(folder / "recipe.yaml").rename(beside)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    old, new = stored.model_dump(mode="json"), recipe.rename(beside).model_dump(mode="json")
    changes = list(_differences(old, new, "")) or [
        f"{file}: other text than the copy in {folder / name}"
        for name, file in recipe.copies().items()
        if file.read_bytes() != (folder / name).read_bytes()
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"{folder}: holds a run of another recipe: {', '.join(changes[:3])}{more}; {advice}"
        )


def note_versions(path: Path) -> None:
    """Append the versions that this process runs on, unless they are those of the last one."""
    now = {
        "minirl": minirl.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            now[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    rows = read_rows(path)
    if not rows or rows[-1] != now:
        write_rows(path, [*rows, now])


def _differences(old: Any, new: Any, path: str) -> Iterable[str]:
    """`a.b: old -> new` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}.{number}")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
