"""The documents say what is so: links and file names exist, commands parse, snippets run.

Invariant: a snippet is run as it is written, but on a tiny model and with few steps.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from conftest import Start

from minirl import recipe as recipes
from minirl.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = (ROOT / "README.md", ROOT / "docs" / "extending.md")
QUOTED = r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n"  # a block that is a file's whole text
SMALL = [f"sampling.{name}" for name in ("attempt_tokens=12", "reflection_tokens=8", "rows=16")]


class Block(NamedTuple):
    """A fenced block of a document, and the line that it begins at."""

    path: Path
    line: int
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks, without the files that a document quotes."""
    text = re.sub(QUOTED, lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.DOTALL)
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(path, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in found]


def name_of(item: Any) -> str:
    return f"{item.path.stem}-{item.line}" if isinstance(item, Block) else item.name


ALL = [block for path in DOCS for block in blocks(path)]
COMMANDS = [
    Block(block.path, block.line + number, "bash", line)
    for block in ALL
    if block.language == "bash"
    for number, line in enumerate(block.text.splitlines())
    if line.startswith("minirl ")
]


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{path.name}: {target}"


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_named_files_exist(path: Path) -> None:
    rooms = r"`((?:minirl|tests|recipes|docs|notebooks|\.ci)/[\w./-]+)`"
    text = re.sub(r"`[\w/]*NAME\.yaml`", "", path.read_text())  # any recipe
    for named in re.findall(rooms, text):
        assert (ROOT / named).exists(), f"{path.name}: {named}"
    for named in re.findall(r"`([\w/]+\.yaml)`", text):
        places = [ROOT / "recipes", ROOT]
        assert named == "recipe.yaml" or any((place / named).exists() for place in places), named


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_commands_parse(command: Block) -> None:
    """Catches: an option that is gone, an override that its recipe does not take."""
    name, *words = shlex.split(command.text, comments=True)[1:]
    group = typer.main.get_command(app)
    parsed = group.commands[name].make_context(name, words).params  # type: ignore[attr-defined]
    if name != "run":
        return
    path = ROOT / parsed["recipe"]
    forms = [path] if parsed["cpu"] is False else [recipes.cpu_form(path), path]
    assert path.exists()
    for form in forms:
        assert recipes.load(form, parsed["set_"] or ()).stages


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_files_are_quoted_as_they_are(path: Path) -> None:
    """The quoted files themselves are run by tests/methods/test_own.py."""
    for name, quoted in re.findall(QUOTED, path.read_text(), re.DOTALL):
        assert quoted == (ROOT / name).read_text()


def run_snippet(text: str, model: str, folder: str) -> None:
    """A snippet in a folder that has the recipes, with all models and numbers made small."""
    import os

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import minirl

    os.chdir(folder)
    load = recipes.load

    def small(path: str | Path, overrides: Any = ()) -> recipes.Recipe:
        sets = [f"model.name={model}", "model.dtype=fp32", "model.quantize=none"]
        sets += ["eval.problems=2", "eval.every=0", *SMALL]
        data = yaml.safe_load(Path(path).read_text())
        for number, stage in enumerate(data["stages"]):
            if f"stages.{number}=null" not in overrides and stage["kind"] == "train":
                few = {"steps": 1, "batch": 2, "group": min(stage.get("group", 8), 2)}
                sets += [f"stages.{number}.{name}={value}" for name, value in few.items()]
        return load(path, [*overrides, *sets])

    minirl.load_recipe = small
    if "r3_countdown/adapter" in text:
        base = AutoModelForCausalLM.from_pretrained(model)
        adapted = get_peft_model(base, LoraConfig(target_modules="all-linear"))
        adapted.save_pretrained("runs/r3_countdown/adapter")
    text = text.replace("Qwen/Qwen2.5-1.5B-Instruct", model)
    exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language == "python" and b.path in RUN], ids=name_of
)
def test_snippets_run(block: Block, start: Start, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    outcome = start(run_snippet, block.text, str(tiny), str(tmp_path)).wait()
    assert outcome.code == 0, outcome.err
