"""The laws of the house, read from the imports alone; and what must stay light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import minirl

ROOT = Path(minirl.__file__).parent
PLAY = ("methods", "rollout", "tasks", "verify", "retrieve", "judge")
MAY_IMPORT_TORCH = ("engine", "loop", "bench")
HEAVY = ("torch", "accelerate", "peft", "bitsandbytes", "safetensors")


class Import(NamedTuple):
    """An import statement: the module, and whether it stands inside a function."""

    module: str
    is_lazy: bool


def _module(path: Path) -> str:
    """minirl/tasks/qa.py -> minirl.tasks.qa; minirl/tasks/__init__.py -> minirl.tasks."""
    parts = ("minirl", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(path: Path) -> list[Import]:
    """All imports of a file; `from minirl.tasks import qa` counts as an import of
    minirl.tasks.qa."""
    found: list[Import] = []

    def visit(node: ast.AST, is_lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; expected absolute imports"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.append(Import(submodule if submodule in FILES else str(node.module), is_lazy))
        inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


IMPORTS = {name: _imports(path) for name, path in FILES.items()}


def _room(name: str) -> str:
    """The top-level folder, or the name of a file that stands beside the folders."""
    return name.split(".")[1] if "." in name else name


def _folder(name: str) -> str:
    """The folder that holds a file; a file directly in minirl/ counts as a folder of its own."""
    folder = FILES[name].relative_to(ROOT).parent
    return name if folder == Path() else folder.as_posix()


def _graph(*, with_lazy: bool) -> dict[str, set[str]]:
    """Which of our files each of our files imports. `minirl` itself is left out: it has only lazy
    re-exports."""
    return {
        name: {
            i.module
            for i in found
            if i.module in FILES and i.module != "minirl" and (with_lazy or not i.is_lazy)
        }
        for name, found in IMPORTS.items()
        if name != "minirl"
    }


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_the_engine_knows_nothing_of_the_play_wing() -> None:
    graph = _graph(with_lazy=True)
    engine = [name for name in graph if _room(name) == "engine"]
    assert len(engine) > 10
    assert {
        name: bad
        for name in engine
        if (bad := [n for n in _reached(graph, name) if _room(n) in PLAY])
    } == {}


@pytest.mark.parametrize(
    "name", sorted(name for name in FILES if _room(name) not in MAY_IMPORT_TORCH)
)
def test_only_the_learn_wing_and_the_loop_import_torch(name: str) -> None:
    heavy = [i for i in IMPORTS[name] if i.module.split(".")[0] in HEAVY]
    assert heavy == []


def test_only_chat_imports_transformers_outside_the_engine() -> None:
    found = {
        (name, i.is_lazy)
        for name, imports in IMPORTS.items()
        for i in imports
        if i.module.split(".")[0] == "transformers"
    }
    assert {(name, is_lazy) for name, is_lazy in found if _room(name) not in MAY_IMPORT_TORCH} == {
        ("minirl.chat", True)
    }


def test_no_file_imports_itself_through_others() -> None:
    graph = _graph(with_lazy=True)
    assert [name for name in graph if name in _reached(graph, name)] == []


@pytest.mark.parametrize("place", [_room, _folder])
def test_no_two_folders_import_each_other(place: object) -> None:
    assert callable(place)
    edges = {(place(a), place(b)) for a, needed in _graph(with_lazy=True).items() for b in needed}
    assert [(a, b) for a, b in edges if a != b and (b, a) in edges] == []


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_light_modules_load_without_torch() -> None:
    light = sorted(
        name for name in FILES if _room(name) not in MAY_IMPORT_TORCH and name != "minirl.__main__"
    )
    code = f"import sys, importlib; [importlib.import_module(n) for n in {light}]; "
    heavy = "{'torch', 'transformers', 'accelerate', 'peft', 'datasets'}"
    assert (
        _python(code + "print({m.split('.')[0] for m in sys.modules} & " + heavy + ")").strip()
        == "set()"
    )


def test_help_imports_nothing_heavy() -> None:
    # Time depends on the machine; what is imported does not, and it is nearly all of the time.
    code = (
        "import sys, contextlib\n"
        "from minirl.cli import app\n"
        "with contextlib.suppress(SystemExit):\n"
        "    app(['--help'])\n"
        "print('IMPORTED', {m.split('.')[0] for m in sys.modules})"
    )
    text, _, imported = _python(code).partition("IMPORTED ")
    assert "run" in text
    slow = {*HEAVY, "transformers", "datasets", "numpy", "pydantic", "yaml", "jinja2", "httpx2"}
    assert slow & set(ast.literal_eval(imported)) == set()
