"""Exact draws, stop strings and streams of uniform numbers."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer

from minirl.chat import Chat
from minirl.engine.sample.draw import Reply, check_finite, pick, stops, uniforms
from minirl.episode import Ask
from minirl.errors import UserError


def test_pick_is_exact() -> None:
    """50,000 draws of a known distribution, chi-square on 4 degrees of freedom below its 99.9 %
    point; catches a warped draw."""
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf"), 2.0, 0.5]]).expand(50_000, -1)
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        chosen, logprobs = pick(logits, [temperature] * 50_000, uniform)
        share = (logits[0] / temperature).softmax(-1)
        counts = torch.bincount(chosen, minlength=6)
        assert counts[3] == 0  # never a token of probability zero
        keep = share > 0
        assert (((counts - 50_000 * share) ** 2)[keep] / (50_000 * share)[keep]).sum() < 18.47
        assert torch.allclose(logprobs, share.log()[chosen], atol=1e-5)


def test_the_largest_uniform_stays_on_the_distribution() -> None:
    logits = torch.full((1, 50_000), -40.0)
    logits[0, 10] = 0.0
    logits[0, -100:] = float("-inf")
    chosen, logprobs = pick(logits, [1.0], torch.tensor([1.0 - 2**-24]))
    assert chosen.item() < 49_900
    assert torch.isfinite(logprobs).all()


def test_logits_that_overflowed_are_told_in_one_line() -> None:
    """Catches: a NaN drawn as a token, or an index error (on a GPU a lost device) in place of a
    message."""
    chosen, logprobs = pick(torch.full((1, 9), float("nan")), [1.0], torch.tensor([0.5]))
    assert 0 <= chosen.item() < 9
    with pytest.raises(
        UserError, match=r"not finite; expected numbers: set model\.dtype=bf16 or fp32"
    ):
        check_finite(logprobs.tolist())
    check_finite([-1.0, 0.0])


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(2, -1)
    chosen, logprobs = pick(logits, [0.0, 1.0], torch.tensor([0.999, 0.999]))
    assert chosen.tolist() == [1, 2]
    assert logprobs.tolist() == pytest.approx(
        torch.tensor([0.0, 3.0, 1.0]).log_softmax(-1)[[1, 2]].tolist()
    )


def test_stop_strings_straddle_tokens() -> None:
    """One token a byte: every stop string straddles tokens. The reply ends with the token that
    completes it, and ids stay as they were."""
    chat = Chat(byte_tokenizer())
    text = list(b"x</answer>y")
    assert [n for n in range(1, len(text) + 1) if stops(chat, text[:n], ("</answer>",))] == [10]
    assert not stops(chat, list(b"</answer"), ("</answer>", "zz"))
    assert stops(chat, list("é!".encode()), ("é!",))


def test_uniforms_are_a_function_of_the_seed() -> None:
    one, two = uniforms(Ask((1,), 5, 1.0, (), 7)), uniforms(Ask((9, 9), 8, 0.5, (), 7))
    assert one == two[:5]
    assert uniforms(Ask((1,), 5, 1.0, (), 8)) != one


def test_a_reply_ends_with_a_stop_string_or_its_last_token() -> None:
    chat = Chat(byte_tokenizer())
    replies = [Reply(n, Ask((1,), 4, 1.0, stop)) for n, stop in enumerate(((), ("bc",)))]
    for reply in replies:
        for token in b"abcd":
            if reply.finish is None:
                reply.append(token, -1.0, chat)
    (_, whole), (key, cut) = (reply.completion(chat) for reply in replies)
    assert (whole.text, whole.finish) == ("abcd", "length")
    assert (key, cut.text, cut.finish, cut.logprobs) == (1, "abc", "stop", (-1.0,) * 3)
