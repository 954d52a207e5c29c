"""Chat: the only place where text becomes token ids.

Invariant: the template renders the first prompt only. Later turns are appended as ids between role markers that were read off the
template once, because chat templates are not prefix-preserving (some drop earlier thoughts), and what was sampled is never encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from minirl.episode import Problem
from minirl.errors import UserError

_USER, _REPLY = "\u2402user\u2403", "\u2402reply\u2403"  # marks that no template contains


class Chat:
    """A tokenizer with its role markers.

    end: the id that ends an assistant turn; eos: every id that ends a completion.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"model {getattr(tokenizer, 'name_or_path', '?')!r} has no chat template; expected a chat or instruct model "
                "(use its -Instruct version, or add a chat_template.jinja to a local copy)"
            )
        self.tokenizer = tokenizer
        self.end, self._before_user, self._after_user = self._markers()
        self.eos: frozenset[int] = frozenset({self.end, *eos, tokenizer.eos_token_id} - {None})

    @classmethod
    def open(cls, path: str) -> Self:
        """The chat of a model folder or hub id."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path))

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """The rendered first prompt, up to and with the marker that opens the assistant's turn."""
        messages = [{"role": "system", "content": problem.system}] if problem.system else []
        messages.append({"role": "user", "content": problem.prompt})
        if problem.tools and not self.renders_tools:
            raise UserError(
                f"{problem.id}: the chat template of {self.tokenizer.name_or_path!r} has no place for tools; "
                "the task should have listed them in the prompt"
            )
        return self._encode(self._render(messages, tools=list(problem.tools) or None))

    @property
    def renders_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in str(self.tokenizer.chat_template)

    def user(self, text: str, *, after: Sequence[int]) -> tuple[int, ...]:
        """A user message to append after an assistant turn whose last sampled ids are `after`.

        Closes the assistant turn first; its end marker is not repeated where the model sampled it itself.
        """
        closing = () if after and after[-1] == self.end else (self.end,)
        return (*closing, *self._encode(self._before_user + text + self._after_user))

    def reply(self, text: str) -> tuple[int, ...]:
        """An assistant message as the model itself would have written it, with its end marker: for demonstrations."""
        return (*self._encode(text), self.end)

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """What the tokens say; special tokens are left out unless asked for."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def _markers(self) -> tuple[int, str, str]:
        """The id that ends an assistant message, the text before a user message, and the text from its end to the assistant's opening."""
        name = getattr(self.tokenizer, "name_or_path", "?")
        user, reply = {"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}
        rendered = self._render([{"role": "user", "content": "a"}, reply, user])
        if rendered.count(_USER) != 1 or rendered.count(_REPLY) != 1:
            raise UserError(f"model {name!r}: its chat template does not show each message once; use a model with another template")
        between, after_user = rendered.split(_REPLY)[1].split(_USER)
        first = self._encode(between)[0]
        if first not in self.tokenizer.all_special_ids:
            raise UserError(
                f"model {name!r}: its chat template ends a reply with {between!r}, expected a special token; use another template"
            )
        end = str(self.tokenizer.decode([first], clean_up_tokenization_spaces=False))
        return first, between.removeprefix(end), after_user

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))
