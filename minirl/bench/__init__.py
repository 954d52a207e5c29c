"""`minirl bench`: what the engine is worth on the user's own machine, beside transformers'
`generate`, padded rows and TRL.

Invariant: what is compared ran in this process by turns, on the same model, prompts and lengths;
nothing here is looked up or assumed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from minirl.bench.ceilings import measure_ceilings
from minirl.bench.measure import Measurement, Report
from minirl.bench.rollouts import measure_rollouts
from minirl.bench.setup import SECTIONS, Bench, Options, open_bench
from minirl.bench.steps import measure_steps
from minirl.bench.table import machine, render
from minirl.bench.updates import measure_updates
from minirl.engine.model.load import describe

__all__ = ["SECTIONS", "Measurement", "Options", "Report", "bench", "render"]

MEASURES: dict[str, Callable[[Bench], list[Measurement]]] = {
    "rollout": measure_rollouts,
    "update": measure_updates,
    "step": measure_steps,
    "ceilings": measure_ceilings,
}


def bench(
    options: Options,
    say: Callable[[str], None] = print,
    keep: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure the sections that the options name, in the order of SECTIONS.

    say: gets a line as each begins. keep: gets the report after each, so that a later one's failure
    loses nothing. Raises UserError for a model that cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = open_bench(options, Path(folder))
        model = describe(opened.loaded)
        if options.random_weights is not None:  # in place of the temporary folder's name
            model = f"random weights of {options.random_weights} · {model.split(' · ', 1)[1]}"
        report = Report(machine(opened), model, asdict(options))
        say(f"{report.model}\n{', '.join(report.machine.values())}")
        for section in SECTIONS:
            if section in options.sections:
                say(f"measuring: {section}")
                report.measurements.extend(MEASURES[section](opened))
                keep(report)
    return report
