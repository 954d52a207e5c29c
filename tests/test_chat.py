"""Chat: one place where text becomes ids, checked against the templates themselves, in the shapes
that real models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, talk_of
from tiny import IM_END, byte_tokenizer, real_model
from tokenizers import AddedToken

from minirl import recipe
from minirl.chat import Chat, tools_text
from minirl.episode import Problem
from minirl.errors import UserError
from minirl.methods.reflect import reflect
from minirl.rollout import play
from minirl.tasks import open_task

LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nTools: {{ tools |"
    " tojson }}<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>{{ m.role"
    " }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if"
    " add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2"
    " == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>{{ 'model' if"
    " m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if"
    " add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Its system message is dropped without a word.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set last = messages | map(attribute='role') | list | length - 1 %}{% if tools"
    " %}<|im_start|>system\n# Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{%"
    " endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and"
    " loop.index0 < last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content"
    " }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
    " endif %}"
)
CHATML = byte_tokenizer().chat_template
SHAPES: dict[
    str, tuple[str, tuple[str, ...], str]
] = {  # template, special tokens, the one that ends a reply
    "chatml": (CHATML, (), "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": (MISTRAL, ("</s>",), "</s>"),
    "mistral, special [INST]": (MISTRAL, ("</s>", "[INST]", "[/INST]"), "</s>"),
    "qwen3": (QWEN3, (), "<|im_end|>"),
}


def chat_of(shape: str) -> Chat:
    template, special, _ = SHAPES[shape]
    return custom(template, *special)


def custom(template: Any, *special: str) -> Chat:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special],
        special_tokens=True,
    )
    tokenizer.chat_template = template
    return Chat(tokenizer)


def rendered(chat: Chat, *said: str) -> tuple[int, ...]:
    """The whole conversation by the template: user, assistant, user, ..., and the opening of the
    next reply."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
    ]
    text = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(chat.tokenizer.encode(text, add_special_tokens=False))


def ids(chat: Chat, text: str) -> tuple[int, ...]:
    return tuple(chat.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_appended_turns_equal_the_template_s_own_rendering(shape: str) -> None:
    chat = chat_of(shape)
    assert chat.text([chat.end], special=True) == SHAPES[shape][2]
    prompt = chat.prompt(Problem("p", "Make 3.", None))
    assert prompt == rendered(chat, "Make 3.")
    sampled = (*ids(chat, "1 + 1"), chat.end)
    second = (*prompt, *sampled, *chat.user("Why?", after=sampled))
    assert second == rendered(chat, "Make 3.", "1 + 1", "Why?")
    assert chat.reply("It is 2.") == (*ids(chat, "It is 2."), chat.end)
    third = (*second, *chat.reply("It is 2."), *chat.user("Again.", after=chat.reply("It is 2.")))
    assert third == rendered(chat, "Make 3.", "1 + 1", "Why?", "It is 2.", "Again.")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text().filter(lambda text: "<|" not in text), min_size=3, max_size=3))
def test_any_chatml_conversation_appends_to_its_rendering(said: list[str]) -> None:
    chat = CHAT
    reply = chat.reply(said[1])
    appended = (*chat.prompt(Problem("p", said[0], None)), *reply, *chat.user(said[2], after=reply))
    assert appended == rendered(chat, *said)
    assert chat.text(reply) == said[1]


CHAT = chat_of("chatml")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_marker_stands_once(shape: str) -> None:
    chat = chat_of(shape)
    said = ids(chat, "1 + 1")
    sampled, cut = chat.user("Why?", after=(*said, chat.end)), chat.user("Why?", after=said)
    assert SHAPES[shape][2] not in chat.text(sampled, special=True).split("Why?")[0], (
        "the model has closed its turn itself"
    )
    assert cut == (
        chat.end,
        *sampled,
    ), "a reply that was cut by its limit or a stop string is closed for it"
    # Whoever reads on sees the same conversation either way.
    assert (*said, chat.end, *sampled) == (*said, *cut)


def test_thoughts_stay_where_the_model_wrote_them() -> None:
    # Qwen3's template drops the thoughts of earlier turns, so rendering anew would train on ids
    # that nobody sampled.
    chat = chat_of("qwen3")
    reply = "<think>\nhm\n</think>\n1 + 1"
    sampled = chat.reply(reply)
    appended = (
        *chat.prompt(Problem("p", "Make 3.", None)),
        *sampled,
        *chat.user("Why?", after=sampled),
    )
    assert b"hm" in bytes(t for t in appended if t < 256)
    assert b"hm" not in bytes(t for t in rendered(chat, "Make 3.", reply, "Why?") if t < 256)
    assert appended[: len(rendered(chat, "Make 3."))] == rendered(chat, "Make 3.")


def test_every_id_that_ends_a_completion() -> None:
    llama = chat_of("llama3")
    assert llama.eos == {llama.end, IM_END}, "the end of a turn and the tokenizer's end of text"
    assert Chat(byte_tokenizer(), eos=[7, 9]).eos == {IM_END, 7, 9}
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert Chat(tokenizer).eos == {IM_END}


def test_an_end_marker_that_only_the_added_tokens_know() -> None:
    # Phi-3 ends its turns with a special token that is not among `all_special_ids`.
    chat = custom(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor"
        " %}<|assistant|>\n",
        "<|end|>",
        "<|user|>",
    )
    assert chat.end not in chat.tokenizer.all_special_ids
    assert chat.text([chat.end], special=True) == "<|end|>"
    assert chat.text([*ids(chat, "yes"), chat.end]) == "yes"


def test_special_tokens_are_left_out_of_the_text_unless_asked_for() -> None:
    tokens = (*ids(CHAT, " a  b . "), CHAT.end)
    assert CHAT.text(tokens) == " a  b . "
    assert CHAT.text(tokens, special=True) == " a  b . <|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; expected a chat or instruct model"),
        ("", "has no chat template"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
            "expected a special token",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "expected a special token"),
        ("{{ messages[-1].content }}<|im_end|>", "does not show each message once"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
            "does not show each message once",
        ),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}",
            "does not take user, assistant, user (one turn only)",
        ),
        ("{% for m in messages %}", "does not take user, assistant, user"),
        ("{{ messages[0].content + 3 }}", "does not take user, assistant, user"),
    ],
)
def test_a_template_that_cannot_be_used(template: str | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        custom(template)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "use" in str(caught.value), "it says what to do next"


SYSTEM = "Be brief."
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Täglich",
            "parameters": {"type": "object", "properties": {}},
        },
    },
)


@pytest.mark.parametrize(
    ("shape", "system", "tools"),
    [
        ("chatml", True, False),
        ("llama3", True, True),
        ("gemma", False, False),
        ("mistral", False, False),
        ("qwen3", True, True),
    ],
)
def test_what_the_template_does_not_show_is_written_out(
    shape: str, system: bool, tools: bool
) -> None:
    chat = chat_of(shape)
    assert (chat.renders_system, chat.renders_tools) == (system, tools)
    prompt = chat.text(
        chat.prompt(Problem("p", "Is it warm?", None, system=SYSTEM, tools=TOOLS)), special=True
    )
    assert (
        prompt.count(SYSTEM)
        == prompt.count("Is it warm?")
        == prompt.count('"weather"')
        == prompt.count("Täglich")
        == 1
    )
    listing = tools_text(TOOLS)
    assert (listing in prompt) == (not tools)
    if shape == "chatml":
        head = f"<|im_start|>system\n{SYSTEM}\n\n{listing}<|im_end|>\n<|im_start|>user\nIs it warm?"
        assert prompt == f"{head}<|im_end|>\n<|im_start|>assistant\n"
    if shape == "gemma":
        assert (
            prompt == f"<|im_start|><start_of_turn>user\n{SYSTEM}\n\n{listing}\n\nIs it"
            " warm?<end_of_turn>\n<start_of_turn>model\n"
        )
    if shape == "mistral":
        assert prompt == f"<|im_start|>[INST] {SYSTEM}\n\n{listing}\n\nIs it warm? [/INST]"


def test_tools_alone_and_system_alone() -> None:
    tools = CHAT.text(CHAT.prompt(Problem("p", "Is it warm?", None, tools=TOOLS)), special=True)
    assert tools.startswith(
        f"<|im_start|>system\n{tools_text(TOOLS)}<|im_end|>\n<|im_start|>user\nIs it"
        " warm?<|im_end|>"
    )
    system = CHAT.text(CHAT.prompt(Problem("p", "Is it warm?", None, system=SYSTEM)), special=True)
    assert system.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")


def test_a_template_that_only_speaks_of_tools_does_not_show_them() -> None:
    chat = custom("{# tools #}" + CHATML)
    assert not chat.renders_tools


def test_tools_text_is_one_json_object_a_line() -> None:
    head, *lines = tools_text(TOOLS * 2).splitlines()
    assert head.endswith(":")
    assert [json.loads(line) for line in lines] == [TOOLS[0]["function"]] * 2
    assert "Täglich" in lines[0]


R3 = """\
[prompt] <|im_start|>user
Make 7 from the numbers 1, 2, 3. Use each number exactly once, with + - * and brackets. \
End with the expression inside <answer> </answer> tags.<|im_end|>
<|im_start|>assistant

[attempt] <answer>1 + 2 + 3</answer>
[request] <|im_end|>
<|im_start|>user
That is not right. In a few words: what went wrong, and what would you do instead?<|im_end|>
<|im_start|>assistant

[reflection] ⟦It is 6. Multiply 2 and 3 first.<|im_end|>⟧
[request] 
<|im_start|>user
Now solve the task again, with this in mind, and answer in the same form.<|im_end|>
<|im_start|>assistant

[retry] <answer>2 * 3 + 1</answer>
reward 1.0  {"first": false, "second": true, "second_error": null, \
"first_error": "missed_target"}  finish stop"""


def test_an_r3_episode_as_the_model_sees_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"nums": [1, 1], "target": 2}\n{"nums": [1, 2, 3], "target": 7}\n'
    )
    node = recipe.Countdown(
        name="countdown", source=str(tmp_path / "rows.jsonl"), operators="+-*", train=1, held_out=1
    )
    task = open_task(node, 0)
    replies = iter(
        [
            "<answer>1 + 2 + 3</answer> and more",
            "It is 6. Multiply 2 and 3 first.",
            "<answer>2 * 3 + 1</answer>",
        ]
    )
    (episode,) = play(
        [reflect(talk_of(task.train[0], CHAT), task)],
        Scripted(CHAT, lambda text, ask: next(replies)),
    )
    assert episode.show(lambda tokens: CHAT.text(tokens, special=True)) == R3


@pytest.mark.slow
def test_the_embedded_model_s_tokenizer() -> None:
    chat = Chat.open(real_model())
    assert (chat.renders_system, chat.renders_tools) == (True, False)
    assert chat.text([chat.end], special=True) == "<|im_end|>"
    problem = Problem("p", "Make 12 from 3, 4.", None, system=SYSTEM, tools=TOOLS)
    messages = [
        {"role": "system", "content": f"{SYSTEM}\n\n{tools_text(TOOLS)}"},
        {"role": "user", "content": problem.prompt},
    ]
    tokens = chat.prompt(problem)
    for reply, request in (
        ("3 + 4", "That is not right."),
        ("<answer>12</answer>", " \n\nSo?"),
        ("", ""),
    ):
        assert tokens == ids(
            chat,
            chat.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            ),
        )
        sampled = chat.reply(reply)
        tokens = (*tokens, *sampled, *chat.user(request, after=sampled))
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": request}]
