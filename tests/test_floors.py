"""Who may import whom, read from the imports alone; and that what must stay light does."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minirl

ROOT = Path(minirl.__file__).parent

# The house by floors: a module imports from its own floor or from below. A package counts as one module.
FLOORS = {
    name: floor
    for floor, names in {
        0: "__init__ errors episode",
        1: "metrics recipe verify retrieve rows hub files statistics evaluations filter_counts "
        "losses optim packed cpu_attention norm allocator calculator compiled kernels bf16_kernels gated",
        2: "tasks chat rundir closed_run state chart batch attention credit head value lora adapter verdicts split",
        3: "rollout policy models embedded sampling slots report progress",
        4: "methods evaluate judge reward endpoint relay rules filters sampler plain learner agreement decode ppo objective scorer",
        5: "speakers session trajectories filtering step_scores playing collect trial train bench",
        6: "cli __main__",
    }.items()
    for name in names.split()
}
LEARN = {"models", "embedded", "policy", "batch", "attention", "credit", "losses", "optim", "learner"}
LEARN |= {"agreement", "decode", "objective", "ppo", "value", "reward", "sampler", "sampling", "plain", "slots", "head"}
LEARN |= {"lora", "scorer", "packed", "cpu_attention", "compiled", "kernels", "bf16_kernels", "gated", "norm", "allocator", "adapter"}
PLAY = {"metrics", "methods", "judge", "endpoint", "rollout", "tasks", "verify", "retrieve", "evaluate"}
PLAY |= {"calculator", "relay", "rules", "filters"}
BOTH = {
    "speakers",
    "session",
    "trajectories",
    "filtering",
    "step_scores",
    "playing",
    "collect",
    "trial",
    "bench",
    "train",
    "cli",
    "__main__",
}
LIGHT = set(FLOORS) - LEARN - BOTH  # the play and record wings, and what they stand on
HEAVY = {"torch", "accelerate", "peft", "bitsandbytes", "safetensors"}


def _imports(path: Path) -> list[tuple[str, bool, str]]:
    """(module, whether it is imported with the file, function or class path it stands in) of every import in a file."""
    found: list[tuple[str, bool, str]] = []

    def visit(node: ast.AST, where: tuple[str, ...], lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, not lazy, ".".join(where)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; the floors are read from absolute ones"
            modules = [f"minirl.{alias.name}" for alias in node.names] if node.module == "minirl" else [str(node.module)]
            found.extend((module, not lazy, ".".join(where)) for module in modules)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            where, lazy = (*where, node.name), lazy or not isinstance(node, ast.ClassDef)
        for child in ast.iter_child_nodes(node):
            visit(child, where, lazy)

    visit(ast.parse(path.read_text(encoding="utf-8")), (), False)
    return found


FILES = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {path: _imports(path) for path in FILES}


def _part(module: str) -> str | None:
    """`minirl.tasks.rows` -> tasks; None for what is not ours. `from minirl import __version__` is of the package itself."""
    if module == "minirl":
        return "__init__"
    if not module.startswith("minirl."):
        return None
    part = module.split(".")[1]
    return part if part in FLOORS else "__init__"


def _needs(*, lazy_too: bool) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {part: set() for part in FILES.values()}
    for path, found in IMPORTS.items():
        parts = {_part(module) for module, eager, _ in found if eager or lazy_too}
        graph[FILES[path]] |= {part for part in parts if part is not None} - {FILES[path]}
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for part in graph[waiting.pop()] - seen:
            seen.add(part)
            waiting.append(part)
    return seen


def test_every_module_stands_on_a_floor() -> None:
    assert set(FILES.values()) <= set(FLOORS), "give the new module its floor in FLOORS, and its wing"
    assert {"episode", "train", "tasks", "learner"} <= set(FILES.values())


def test_imports_go_down() -> None:
    upward = [(a, b) for a, needed in _needs(lazy_too=True).items() for b in needed if FLOORS[b] > FLOORS[a]]
    assert upward == []


def test_no_cycles() -> None:
    graph = _needs(lazy_too=True)
    assert not {part for part in graph if part in _reached(graph, part)}


def test_no_cycles_inside_packages() -> None:
    # Between files, a package's own __init__ included: what it imports lazily may import from it.
    names = {path: ".".join(("minirl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for path in FILES}
    graph = {name: {m for m, eager, _ in IMPORTS[path] if eager and m in names.values()} for path, name in names.items()}
    assert [name for name in graph if name in _reached(graph, name)] == []


@pytest.mark.parametrize("part", sorted(LIGHT))
def test_play_and_record_import_no_torch(part: str) -> None:
    found = [(path, module) for path, imports in IMPORTS.items() if FILES[path] == part for module, _, _ in imports]
    assert [(path.name, module) for path, module in found if module.split(".")[0] in HEAVY] == []


def test_only_chat_open_imports_transformers() -> None:
    found = {
        (FILES[path], where)
        for path, imports in IMPORTS.items()
        for module, _, where in imports
        if module.split(".")[0] == "transformers" and FILES[path] in LIGHT
    }
    assert found == {("chat", "Chat.open")}


def test_the_wings_never_meet_below_the_loop() -> None:
    graph = _needs(lazy_too=True)
    assert [(part, found) for part in LEARN & set(graph) if (found := _reached(graph, part) & PLAY)] == []
    assert [(part, found) for part in LIGHT & set(graph) if (found := _reached(graph, part) & LEARN)] == []


def test_only_the_loop_knows_both_wings() -> None:
    graph = _needs(lazy_too=True)
    both = {part for part in graph if _reached(graph, part) & PLAY and _reached(graph, part) & LEARN}
    assert both == BOTH


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_light_modules_load_without_torch() -> None:
    modules = sorted(({*FILES.values()} & LIGHT | {"cli"}) - {"__init__"})
    code = f"import sys, importlib; [importlib.import_module('minirl.' + n) for n in {modules}]; "
    heavy = _python(code + "print({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'accelerate', 'peft', 'datasets'})")
    assert heavy.strip() == "set()"


def test_help_answers_at_once() -> None:
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        answer = subprocess.run([sys.executable, "-m", "minirl", "--help"], capture_output=True, text=True, check=True).stdout
        walls.append(time.perf_counter() - began)
        assert "run" in answer
        if walls[-1] < 0.5:
            break
    assert min(walls) < 0.5, f"minirl --help took {walls} s"
