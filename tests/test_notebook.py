"""The notebook runs from top to bottom on the embedded model, in its shortened form."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import real_model

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "01_reflect_retry.ipynb"


@pytest.mark.slow
def test_the_first_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_model()
    monkeypatch.setenv("MINIRL_QUICK", "1")
    monkeypatch.setenv("MINIRL_RUNS", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    cells = {i: cell for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    shown = [
        out["data"].get("text/html", "")
        for cell in cells.values()
        for out in cell.outputs
        if "data" in out
    ]
    episode, curves, tried = (html for html in shown if "<iframe" in html)
    assert episode.count("turn trained") == 1  # the reflection, and nothing else
    assert "reflection" in episode.split("turn trained")[1].split("turn ")[0]
    assert "&lt;svg" in curves
    assert tried.count("<iframe") == 2
    assert (tmp_path / "quick" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
