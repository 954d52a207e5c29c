"""The command line. Nothing heavy is imported before a command needs it: `minirl --help` answers at
once, without torch.

Invariant: a user's mistake ends in one line on standard error and exit code 2, never in a
traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from minirl.errors import UserError, first_line

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DRIVER = Path("/proc/driver/nvidia/version")
OUT_OF_MEMORY = (
    "the GPU is out of memory: another program may hold some of it; else lower sampling.rows,"
    " sampling.cache_tokens or learner.micro_tokens, or set model.quantize=nf4 and"
    " model.gradient_checkpointing=true, in a run folder of its own (--out)"
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
    """Before every command: notices of the library (a model being fetched, say) go to standard
    error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("minirl").setLevel(logging.INFO)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only print the resolved recipe and the plan")
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
    """Run a recipe, or take up its run folder where it stands."""
    with _one_line():
        from minirl import recipe as recipes

        main = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` the others keep quiet
        found = _has_accelerator()
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
        if not found and main and (hidden := _unseen_gpu()):
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
        typer.Argument(help="A run folder, e.g. runs/r3_countdown; with --table also several"),
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
            help="A run with a reward model, which picks one of the samples",
            metavar="RUN",
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option("--task", help="Another recipe: try the run on its task", metavar="RECIPE"),
    ] = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Question answering: the baselines beside search, base and adapter"
        ),
    ] = False,
) -> None:
    """Evaluate a run's adapter on its held-out problems; --samples 8 gives pass@k."""
    with _one_line():
        from minirl.loop.comparison import compare_runs
        from minirl.loop.table import format_table
        from minirl.loop.trial import evaluate_run

        folder = folders[0]
        if len(folders) > 1 and not table:
            raise UserError(
                f"eval: got {len(folders)} run folders, expected one; --table pools runs that"
                " differ in their seed"
            )
        if table:
            if samples or vote or rerank:
                raise UserError(
                    "--table: got it with --samples, --vote or --rerank, expected it alone: it"
                    " compares single tries"
                )
            if base or method:
                raise UserError(
                    "--table: got it with --base or --method, expected neither: it compares all"
                    " methods, base and adapter"
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
        summary = found.summary
        for name in ("majority", "reranked"):
            if share := summary["scores"].get(name):
                typer.echo(
                    f"{name}@{summary['samples']} {share.value:.1%} [{share.low:.1%},"
                    f" {share.high:.1%}]"
                )
        for k, share in summary["pass_at_k"].items():
            typer.echo(f"pass@{k} {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]")
        for name in (
            "first_errors",
            *(("second_errors",) if summary["second"] is not None else ()),
        ):
            typer.echo(
                f"{name.replace('_', ' ')}: "
                + (", ".join(f"{kind} {n}" for kind, n in summary[name].items()) or "none")
            )


@app.command()
def report(folder: FolderArgument) -> None:
    """Write report.html again from what the run folder holds; needs no GPU and no torch."""
    with _one_line():
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
            help="A hub id or config.json: that shape with random weights",
            metavar="CONFIG",
        ),
    ] = None,
    quantize: Annotated[str, typer.Option("--quantize", help="none, nf4 or int8")] = "none",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32")] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, slower updates, on all sides"),
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay decode steps from captured graphs")
    ] = False,
    sections: Annotated[
        str, typer.Option("--sections", help="Some of these")
    ] = "rollout,update,step,ceilings,retrieval",
    repeats: Annotated[
        int, typer.Option("--repeats", help="Counted rounds, after one to warm up")
    ] = 3,
    step_tokens: Annotated[
        str | None,
        typer.Option("--step-tokens", help="Of whole steps, e.g. 512/512", metavar="PROMPT/NEW"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: whether it works, not how fast it is")
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option("--json", help="Also write every number to this file", metavar="PATH"),
    ] = None,
) -> None:
    """Measure rollouts, updates and whole steps on this machine, beside transformers' generate,
    padded rows and TRL."""
    with _one_line():
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


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def _unseen_gpu() -> str | None:
    """Why torch does not see the GPU of a machine that has NVIDIA's driver; None where there is
    none, or it is hidden on purpose."""
    import torch

    if not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    driver = next(
        (word for word in DRIVER.read_text().split() if word[:1].isdigit() and "." in word),
        "of unknown version",
    )
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"an NVIDIA driver ({driver}) is here, but torch {torch.__version__}, {built}, sees no GPU:"
        " this would run on the CPU; install a torch build that fits the driver"
        " (https://pytorch.org/get-started/locally), or a newer driver"
    )


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        typer.echo(f"minirl: {error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if (
            type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, which is not imported for the sake of its name
            raise
        typer.echo(f"minirl: {OUT_OF_MEMORY} ({first_line(error)})", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("minirl: stopped at once; the same command goes on from the last save", err=True)
        sys.exit(130)


if __name__ == "__main__":
    app()
