"""The command line. Nothing heavy is imported before a command needs it: `minirl --help` answers at once, without torch.

Invariant: a user's mistake ends in one line on standard error and exit code 2, never in a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from minirl.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/r3_countdown.yaml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a number: --set model.lora.rank=32", metavar="A.B=VALUE")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<recipe's name>")]
FolderArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/r3_countdown")]


@app.callback(help="Train quantised LoRA adapters with reinforcement learning on one GPU.")
def main() -> None:
    """Before every command: notices of the library (a model being fetched, say) go to standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("minirl").setLevel(logging.INFO)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only print the resolved recipe and the plan")] = False,
) -> None:
    """Run a recipe, or take up its run folder where it stands."""
    with _one_line():
        from minirl import recipe as recipes

        on_cpu = not _has_accelerator()
        node = recipes.load(recipe, set_ or (), on_cpu=on_cpu)
        main = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` the others keep quiet
        if on_cpu and main:
            typer.echo("# no accelerator found: the recipe's on_cpu part, if it has one, is laid over it")
        if dry:
            typer.echo(node.dump() + "\n" + node.plan())
            return
        folder = out or Path("runs") / recipe.stem
        from minirl.session import Interrupted
        from minirl.train import train

        try:
            adapter = train(node, folder)
        except Interrupted:
            if main:
                typer.echo(f"stopped; the same command takes {folder} up again", err=True)
            raise typer.Exit(130) from None
        if main:
            typer.echo(f"adapter: {adapter}")


@app.command("eval")
def eval_(
    folder: FolderArgument,
    set_: SetOption = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the model without the run's adapter")] = False,
) -> None:
    """Evaluate a run's adapter on its held-out problems; --set eval.samples=8 --set eval.temperature=1 gives pass@k."""
    with _one_line():
        from minirl.trial import evaluate_run

        summary = evaluate_run(folder, set_ or (), base=base).summary
        for k, share in summary["pass_at_k"].items():
            typer.echo(f"pass@{k} {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]")
        for name in ("first_errors", "second_errors"):
            typer.echo(f"{name.replace('_', ' ')}: " + (", ".join(f"{kind} {n}" for kind, n in summary[name].items()) or "none"))


@app.command()
def report(folder: FolderArgument) -> None:
    """Write report.html again from what the run folder holds; needs no GPU and no torch."""
    with _one_line():
        from minirl.report import write_report

        typer.echo(write_report(folder))


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        typer.echo(f"minirl: {' '.join(str(error).split())}", err=True)  # what libraries say may have many lines
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("minirl: stopped at once; the same command goes on from the last save", err=True)
        sys.exit(130)


if __name__ == "__main__":
    app()
