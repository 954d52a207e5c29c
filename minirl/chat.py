"""Chat: the only place where text becomes token ids.

Invariant: the template renders the first prompt only. Later turns are appended as ids between role
markers that were read off the template once, because chat templates are not prefix-preserving (some
drop earlier thoughts), and what was sampled is never encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from minirl.episode import Problem
from minirl.errors import UserError

# Marks that no template contains.
_SYSTEM, _USER, _REPLY, _TOOL = (
    "\u2402system\u2403",
    "\u2402user\u2403",
    "\u2402reply\u2403",
    "a_tool_that_no_template_has",
)
# For base models: a transcript. An assistant's turn ends with the end-of-text token, the one that
# such a model knows.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{"
    " 'User: ' + m.content }}{% else %}{{ 'Assistant:\n' + m.content + eos_token }}{% endif %}{{"
    " '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


class Chat:
    """A tokenizer with its role markers.

    end: the id that ends an assistant turn; eos: every id that ends a completion. renders_system,
    renders_tools: whether the template shows a system message and tools to the model; what it does
    not show is written into the first message that it does.
    plain: take the tokenizer of a base model and write a transcript ("User: ... Assistant: ...") in
    place of its chat template.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int] = (), *, plain: bool = False) -> None:
        if not plain and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"model {getattr(tokenizer, 'name_or_path', '?')!r} has no chat template; expected"
                " a chat or instruct model (use its -Instruct version, set model.template=plain"
                " for a base model, or add a chat_template.jinja to a local copy)"
            )
        self.tokenizer = tokenizer
        self._template = PLAIN if plain else None
        start = tokenizer.encode("", add_special_tokens=True)[:1] if plain else []
        self._start = tuple(
            token for token in start if token == tokenizer.bos_token_id
        )  # templates write it themselves
        self.end, self._before_user, self._after_user = self._markers()
        user = {"role": "user", "content": _USER}
        self.renders_system = self._shows(_SYSTEM, [{"role": "system", "content": _SYSTEM}, user])
        self.renders_tools = self._shows(_TOOL, [user], _TOOLS)
        self.eos: frozenset[int] = frozenset({self.end, *eos, tokenizer.eos_token_id} - {None})

    @classmethod
    def open(cls, path: str) -> Self:
        """The chat of a model folder or hub id."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path))

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """The rendered first prompt, up to and with the marker that opens the assistant's turn."""
        system = [problem.system] if problem.system else []
        if problem.tools and not self.renders_tools:
            system.append(tools_text(problem.tools))
        if system and self.renders_system:
            messages = [
                {"role": "system", "content": "\n\n".join(system)},
                {"role": "user", "content": problem.prompt},
            ]
        else:
            messages = [{"role": "user", "content": "\n\n".join([*system, problem.prompt])}]
        return (
            *self._start,
            *self._encode(
                self._render(messages, list(problem.tools) if self.renders_tools else [])
            ),
        )

    def user(self, text: str, *, after: Sequence[int]) -> tuple[int, ...]:
        """A user message to append after an assistant turn whose last sampled ids are `after`.

        Closes the assistant turn first; its end marker is not repeated where the model sampled it
        itself.
        """
        closing = () if after and after[-1] == self.end else (self.end,)
        return (*closing, *self._encode(self._before_user + text + self._after_user))

    def heard(self, tokens: Sequence[int]) -> str:
        """The text of a message whose tokens are those of `user`, without the markers around it."""
        text, before, after = (
            self.text(tokens, special=True),
            self._before_user.strip(),
            self._after_user.strip(),
        )
        start, end = text.find(before), text.rfind(after)
        return text[
            start + len(before) if start >= 0 else 0 : end if after and end >= 0 else len(text)
        ].strip()

    def reply(self, text: str) -> tuple[int, ...]:
        """An assistant message as the model itself would have written it, with its end marker: for
        demonstrations."""
        return (*self._encode(text), self.end)

    def inside(self, text: str) -> tuple[int, ...]:
        """Text to append inside an assistant turn that goes on after it, such as a retrieved
        result; encoded on its own."""
        return self._encode(text)

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """What the tokens say; special tokens are left out unless asked for."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _markers(self) -> tuple[int, str, str]:
        """The id that ends an assistant message, the text before a user message, and the text from
        its end to the assistant's opening."""
        name = self._name
        user, reply = {"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}
        rendered = self._render([{"role": "user", "content": "a"}, reply, user])
        if rendered.count(_USER) != 1 or rendered.count(_REPLY) != 1:
            raise UserError(
                f"model {name!r}: its chat template does not show each message once; use a model"
                " with another template"
            )
        between, after_user = rendered.split(_REPLY)[1].split(_USER)
        first = next(iter(self._encode(between)), None)
        if first is None or not self._special(first):
            raise UserError(
                f"model {name!r}: its chat template ends a reply with {between!r}, expected a"
                " special token; use another template"
            )
        end = str(self.tokenizer.decode([first], clean_up_tokenization_spaces=False))
        return first, between.removeprefix(end), after_user

    def _special(self, token: int) -> bool:
        # Some models (Phi-3) mark the end of a turn with a special token that they do not list
        # among `all_special_ids`.
        added = self.tokenizer.added_tokens_decoder.get(token)
        return token in self.tokenizer.all_special_ids or bool(added and added.special)

    def _shows(
        self, mark: str, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> bool:
        """Whether the template shows `mark`; some refuse what they have no place for, others leave
        it out."""
        try:
            return mark in self._render(messages, tools)
        except UserError:
            return False

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (
            TemplateError,
            TypeError,
        ) as error:  # TypeError: a template that adds text to what is none
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"model {self._name!r}: its chat template does not take {roles} ({error}); use"
                " another template"
            ) from error
        return str(rendered)

    @property
    def _name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "?"))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as text, one JSON object a line, for a chat template that has no place for them.
    `tools`: as in `Problem.tools`."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    return "\n".join(["These are the tools that you can call, one JSON object a line:", *lines])
