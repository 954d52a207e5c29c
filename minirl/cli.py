"""The command line. A command imports what it needs itself, so `minirl --help` answers at once.

Invariant: a user's mistake ends in one line on standard error and exit code 2, not in a traceback.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from minirl.errors import UserError, first_line

OUT_OF_MEMORY = (
    "the GPU is out of memory: another program may hold some of it; else lower sampling.rows,"
    " sampling.cache_tokens or learner.micro_tokens, or set model.quantize=nf4 and"
    " model.gradient_checkpointing=true, in a run folder of its own (--out)"
)


class _Commands(typer.core.TyperGroup):
    """The commands; a user's mistake in any of them ends in one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user has named."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            message, code = str(error), 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch takes seconds
                raise
            message, code = f"{OUT_OF_MEMORY} ({first_line(error)})", 2
        except KeyboardInterrupt:
            message, code = "stopped at once; the same command goes on from the last save", 130
        typer.echo(f"minirl: {message}", err=True)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/r3_countdown.yaml")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: --set model.lora.rank=32", metavar="A.B=VALUE"),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Run folder; default runs/<recipe's name>")
]
FolderArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/r3_countdown")]


@app.callback(help="Train quantised LoRA adapters with reinforcement learning on one GPU.")
def main() -> None:
    """Before every command: the library's notices (a model is downloaded, say) go to standard
    error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("minirl").setLevel(logging.INFO)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only print the whole recipe and the plan")
    ] = False,
    cpu: Annotated[
        bool | None,
        typer.Option(
            "--cpu/--gpu",
            help="Take the recipe's small form (cpu/ beside it), or the recipe itself, on any"
            " machine; default: the small form where there is no GPU",
        ),
    ] = None,
) -> None:
    """Run a recipe, or resume it where its run folder stopped."""
    from minirl import recipe as recipes
    from minirl.loop import machine

    main = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` the others keep quiet
    found = machine.has_gpu()
    on_cpu = not found if cpu is None else cpu
    chosen = recipes.cpu_form(recipe) if on_cpu else recipe
    node = recipes.load(chosen, set_ or ())
    if on_cpu and main and recipe.parent.name != "cpu":
        why = "--cpu" if cpu else "no GPU found"
        typer.echo(
            f"# {why}: taking {chosen}"
            if chosen != recipe
            else f"# {why}: {recipe} runs as it is, there is no cpu/{recipe.name} beside it"
        )
    if not found and main and (hidden := machine.unseen_gpu()):
        typer.echo(f"# WARNING: {hidden}", err=True)
    if dry:
        typer.echo(node.dump() + "\n" + node.plan())
        return
    folder = out or Path("runs") / recipe.stem
    from minirl.loop.session import Interrupted
    from minirl.loop.train import train

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
    folders: Annotated[
        list[Path],
        typer.Argument(help="A run folder, e.g. runs/r3_countdown; several with --table"),
    ],
    set_: SetOption = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the model without the run's adapter")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option("--method", help="no_rag, naive_rag, iter_retgen, ircot, search, stepwise"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="Samples a problem, for pass@k, --vote and --rerank", metavar="K"
        ),
    ] = None,
    vote: Annotated[
        bool, typer.Option("--vote", help="Maths: the answer that most samples give")
    ] = False,
    rerank: Annotated[
        Path | None,
        typer.Option(
            "--rerank",
            help="Pick one of the samples by the reward model of this run",
            metavar="RUN",
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option("--task", help="Evaluate on the task of this recipe", metavar="RECIPE"),
    ] = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Question answering: compare all methods, without and with the adapter"
        ),
    ] = False,
) -> None:
    """Evaluate a run's adapter on its held-out problems; --samples 8 gives pass@k."""
    from minirl.loop.comparison import compare_runs
    from minirl.loop.table import format_table, summary_lines
    from minirl.loop.trial import evaluate_run

    folder = folders[0]
    if len(folders) > 1 and not table:
        raise UserError(
            f"eval: got {len(folders)} run folders, expected one; --table pools runs that"
            " differ in their seed"
        )
    if table:
        if samples or vote or rerank or base or method:
            raise UserError(
                "--table: got it with --samples, --vote, --rerank, --base or --method, expected"
                " none of these: it compares single tries of all methods, base and adapter"
            )
        typer.echo(format_table(compare_runs(folders, set_ or (), task=task)))
        return
    found = evaluate_run(
        folder,
        set_ or (),
        base=base,
        method=method,
        samples=samples,
        vote=vote,
        rerank=rerank,
        task=task,
    )
    for line in summary_lines(found.summary):
        typer.echo(line)


@app.command()
def report(folder: FolderArgument) -> None:
    """Write report.html from the files of a run folder; needs no GPU and no torch."""
    from minirl.record.report import write_report

    typer.echo(write_report(folder))


@app.command()
def bench(
    model: Annotated[
        str, typer.Option("--model", help="A hub id, a local folder or smollm2-135m")
    ] = "smollm2-135m",
    random_weights: Annotated[
        str | None,
        typer.Option(
            "--random-weights",
            help="A hub id or config.json; its model is built with random weights",
            metavar="CONFIG",
        ),
    ] = None,
    quantize: Annotated[str, typer.Option("--quantize", help="none, nf4 or int8")] = "none",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32")] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, slower updates"),
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay decode steps from captured graphs")
    ] = False,
    sections: Annotated[
        str, typer.Option("--sections", help="Which parts to measure")
    ] = "rollout,update,step,ceilings",
    repeats: Annotated[
        int, typer.Option("--repeats", help="Counted rounds, after one to warm up")
    ] = 3,
    step_tokens: Annotated[
        str | None,
        typer.Option("--step-tokens", help="Tokens of a step, e.g. 512/512", metavar="PROMPT/NEW"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a test that it works")
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option("--json", help="Also write every number to this file", metavar="PATH"),
    ] = None,
) -> None:
    """Measure rollouts, updates and whole steps on this machine, beside transformers' generate,
    padded rows and TRL."""
    if json_ is not None and not json_.parent.is_dir():
        raise UserError(
            f"--json: {json_.parent} is not a folder; make it first, an hour's figures would be"
            " lost"
        )
    from rich.console import Console

    from minirl import bench as benches

    options = benches.Options.parse(
        model=model,
        random_weights=random_weights,
        quantize=quantize,
        dtype=dtype,
        gradient_checkpointing=checkpointing,
        cuda_graphs=cuda_graphs,
        sections=sections,
        repeats=repeats,
        quick=quick,
        step_tokens=step_tokens,
    )

    def keep(report: benches.Report) -> None:
        if json_ is not None:
            json_.write_text(json.dumps(report.to_json(), indent=1) + "\n")

    found = benches.bench(options, lambda line: typer.echo(line, err=True), keep)
    Console().print(benches.render(found))


if __name__ == "__main__":
    app()
