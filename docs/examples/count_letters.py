"""A task of one's own: how many times a letter occurs in a word.

A function that returns a `minirl.Task`: problems to train on, others held out, and a verifier.
"""

from random import Random

from minirl import Problem, Task, Verdict

WORDS = ["banana", "committee", "mississippi", "parallel", "success", "balloon", "coffee"]
WORDS += ["letter", "pepper", "address"]


def count_letters(train: int = 200, held_out: int = 40, seed: int = 0) -> Task:
    """The arguments are `task.options` of the recipe; `seed` is the recipe's own."""
    pairs = [(word, letter) for word in WORDS for letter in "abcdefghijklmnopqrstuvwxyz"]
    Random(seed).shuffle(pairs)
    problems = [
        Problem(
            id=f"{word}/{letter}",
            prompt=f"How many times does the letter {letter} occur in the word {word}? End with"
            " the number alone between <answer> and </answer>.",
            answer=word.count(letter),
        )
        for word, letter in pairs[: train + held_out]
    ]
    return Task("count_letters", problems[held_out:], problems[:held_out], verify, ("</answer>",))


def verify(problem: Problem, text: str) -> Verdict:
    """Score 1 for the right number, 0.1 for another number, 0 for none."""
    said = text.rpartition("<answer>")[2].removesuffix("</answer>").strip()
    if not (text.endswith("</answer>") and said.isdecimal()):
        return Verdict(0.0, passed=False, parts={"error_kind": "no number"})
    if int(said) != problem.answer:
        return Verdict(0.1, passed=False, parts={"error_kind": "miscounted"})
    return Verdict(1.0, passed=True)
