"""A recipe: the only place a number is written.

A frozen pydantic tree read from YAML. Invariant: what a run does is a function of its resolved
recipe alone, and an unknown key is refused with its path and the nearest known key, never ignored.
"""

from minirl.recipe.base import Frozen
from minirl.recipe.judge import Judge, Other
from minirl.recipe.learner import PRESETS, Learner
from minirl.recipe.maths import Gsm8k, Mathqa, Maths, MathsCredit, ProgramLimits, Svamp
from minirl.recipe.methods import METHODS, MethodFacts
from minirl.recipe.model import Lora, Model
from minirl.recipe.qa import QA, Bamboogle, HotpotQA, MuSiQue, TwoWikiMultiHopQA
from minirl.recipe.read import cpu_form, load, override, parse
from minirl.recipe.retriever import Bm25Retriever, RemoteRetriever, Retriever
from minirl.recipe.sampling import Sampling, Stepwise
from minirl.recipe.stages import Collect, Filter, RewardModel, Stage, Train
from minirl.recipe.tasks import (
    Countdown,
    CountdownCredit,
    FunctionCalling,
    FunctionCallingCredit,
    Own,
    Task,
)
from minirl.recipe.tree import Eval, Recipe, Save

__all__ = [
    "METHODS",
    "PRESETS",
    "QA",
    "Bamboogle",
    "Bm25Retriever",
    "Collect",
    "Countdown",
    "CountdownCredit",
    "Eval",
    "Filter",
    "Frozen",
    "FunctionCalling",
    "FunctionCallingCredit",
    "Gsm8k",
    "HotpotQA",
    "Judge",
    "Learner",
    "Lora",
    "Mathqa",
    "Maths",
    "MathsCredit",
    "MethodFacts",
    "Model",
    "MuSiQue",
    "Other",
    "Own",
    "ProgramLimits",
    "Recipe",
    "RemoteRetriever",
    "Retriever",
    "RewardModel",
    "Sampling",
    "Save",
    "Stage",
    "Stepwise",
    "Svamp",
    "Task",
    "Train",
    "TwoWikiMultiHopQA",
    "cpu_form",
    "load",
    "override",
    "parse",
]
