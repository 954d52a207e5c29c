"""A method of one's own: a draft, a critique of it, and a revision, in one conversation.

A method is a generator that plays one episode: `ask` lets the model speak, `tell` speaks to it. The
reward is the revision's verdict; critique and revision are trained, the draft is not.
"""

import minirl
from minirl import Talk, Task

CRITIQUE = "Look for mistakes in your answer, one by one. Do not answer again yet."
REVISE = "Now give your final answer, in the same form as before."


@minirl.method(
    sampled_tokens=lambda limits: 2 * limits.attempt_tokens + limits.reflection_tokens,
    trained_tokens=lambda limits: limits.attempt_tokens + limits.reflection_tokens,
)
def draft_critique_revise(talk: Talk, task: Task):
    """Draft, critique, revision; the report counts how many revisions are right."""
    limits = talk.sampling
    draft = yield from talk.ask("draft", max_tokens=limits.attempt_tokens, stop=task.stop)
    talk.tell("request", CRITIQUE)
    yield from talk.ask("critique", max_tokens=limits.reflection_tokens, trained=True)
    talk.tell("request", REVISE)
    revision = yield from talk.ask(
        "revision", max_tokens=limits.attempt_tokens, trained=True, stop=task.stop
    )
    drafted = task.verify(talk.problem, draft)
    return talk.end(task.verify(talk.problem, revision), draft_passed=drafted.passed)
