"""Reads a recipe: YAML, then `--set` overrides. Errors name the path as the user wrote it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minirl.errors import UserError
from minirl.recipe.own import absolute
from minirl.recipe.tree import Recipe

# pydantic's words for what YAML calls otherwise.
EXPECTED = {
    **dict.fromkeys(
        ("model_type", "dict_type", "model_attributes_type"),
        "expected a mapping, e.g. {key: value}",
    ),
    **dict.fromkeys(("tuple_type", "list_type"), "expected a list, e.g. [value]"),
}


def cpu_form(path: Path) -> Path:
    """The embedded form of a recipe: `cpu/x.yaml` beside `x.yaml`. The path itself if there is
    none."""
    small = path.parent / "cpu" / path.name
    return small if small.is_file() else path


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay the `a.b=value` overrides over it; `stages.0=null` takes a stage out
    once all are laid.

    Raises UserError for a file that cannot be read, YAML that does not parse, an unknown key or a
    wrong value.
    """
    try:
        data = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot read the recipe ({error}); expected a YAML file"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: got {type(data).__name__}, expected a mapping with the keys model, task,"
            " stages"
        )
    if "on_cpu" in data:
        raise UserError(
            f"{path}: got the key on_cpu, expected a file of its own: write the whole recipe for a"
            f" CPU to {Path(path).parent / 'cpu' / Path(path).name}"
        )
    changed: Mapping[str, Any] = data
    for text in overrides:
        changed = override(changed, text)
    if overrides and isinstance(stages := changed.get("stages"), list):
        changed = {**changed, "stages": [stage for stage in stages if stage is not None]}
    named = {text.partition("=")[0].strip() for text in overrides}
    hint = None if "task" in named else _renamed(data.get("task"), changed.get("task"), named)
    try:
        folder = Path(path).parent
        return parse(changed, str(path)).rename(lambda name: absolute(name, folder))
    except UserError as error:
        raise UserError(f"{error}; {hint}" if hint else str(error)) from error


def parse(data: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data; UserError names `where` and the path of the first wrong value."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, data)}") from error


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """`data` with one `a.b=value` set; list items by number (`stages.0.steps=5`), the value read as
    YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: expected a.b=value")
    try:
        changed: dict[str, Any] = _set(data, path.split("."), _read_yaml(value), text)
        return changed
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--set {text}: the value is not valid YAML ({error})") from error


def _renamed(before: Any, after: Any, named: set[str]) -> str | None:
    """What to do about the other keys of a task that got another name; UserError where it would
    read the old one's files.

    named: the paths that were set.
    """
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)) or before.get(
        "name"
    ) == after.get("name"):
        return None
    hint = (
        f"write --set 'task={{name: {after['name']}}}' to leave out the other keys of task"
        f" {before.get('name')}, or set them too"
    )
    for key in ("source", "test_source"):
        if before.get(key) is not None and f"task.{key}" not in named:
            # Its rows would be read as the other task's, and be wrong without a word.
            raise UserError(
                f"--set task.name={after['name']}: task.{key} is still {before[key]!r}; {hint}"
            )
    return hint


class _Loader(yaml.SafeLoader):
    """Builds plain data only, and refuses a key that is written twice: the first would be dropped
    without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _set(node: Any, keys: list[str], value: Any, text: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UserError(
                f"--set {text}: got {key!r}, expected the number of a list item, 0 to"
                f" {len(node) - 1}"
            )
        return [*node[: int(key)], _set(node[int(key)], rest, value, text), *node[int(key) + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise UserError(f"--set {text}: {key!r} lies under a plain value, {node!r}")
    node = node or {}
    return {**node, key: _set(node.get(key), rest, value, text)}


def _explain(error: ValidationError, data: Any) -> str:
    """The first thing that is wrong, with its path as the user wrote it."""
    first = error.errors()[0]
    path, node = "", data
    for key in first["loc"]:
        if isinstance(node, Mapping) and key not in node and first["type"] != "missing":
            continue  # pydantic names the chosen member of a union; the user wrote no such key
        if isinstance(key, int):
            path += f"[{key}]"
            node = node[key] if isinstance(node, Sequence) and key < len(node) else None
        elif not (
            isinstance(node, Mapping)
            and key not in node
            and key in (node.get("kind"), node.get("name"))
        ):
            path += f".{key}" if path else str(key)
            node = node.get(key) if isinstance(node, Mapping) else None
    message = EXPECTED.get(first["type"], first["msg"].removeprefix("Value error, "))
    got = (
        ""
        if first["type"] in ("missing", "value_error")
        else f" (got {str(first['input'])[:80]!r})"
    )
    if first["type"] == "union_tag_not_found" and not isinstance(first["input"], Mapping):
        message = EXPECTED["dict_type"]
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = first["ctx"]
        name = context["discriminator"].strip("'").removesuffix("()")
        path, got = f"{path}.{name}", ""
        message = (
            "got {tag!r}, expected one of {expected_tags}".format(**context)
            if "tag" in context
            else "Field required"
        )
    return f"{path or 'recipe'}: {message}{got}"
