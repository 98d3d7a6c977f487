"""The first batch as text: every token is visible, and the mask shows what is trained on."""

import re

import numpy as np
import pytest

from ctxjax.data import prompts
from ctxjax.data.worlds import word_tokenizer
from ctxjax.training import batch_text
from ctxjax.training.batch_text import Formatter, Sampled
from ctxjax.types import Batch, Rollout

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = 0, 2, 3, 4, 5, 6
A, B, LINE, ESCAPE = 7, 8, 9, 10
CODES = re.compile(r"\033\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer.build(["a", "b", "\n", "\033[31m\t"], "[ab\n]")


def make_batch(*questions, context=(A, LINE), other=None) -> Batch:
    def chat(*start):
        return [[*start, USER, *question, ASSISTANT] for question in questions]

    views = chat(BEGIN), chat(BEGIN, SYSTEM, *context), other
    padded = (prompts.left_pad(view, max(map(len, view)), PAD) if view else None for view in views)
    return Batch(*padded, np.arange(len(questions), dtype=np.int32))


def make_rollout(*rows) -> Rollout:
    """Make host responses from rows of (tokens, number of trained tokens)."""
    tokens = np.array([tokens for tokens, _ in rows], np.int32)
    mask = np.arange(tokens.shape[1]) < np.array([[count] for _, count in rows])
    return Rollout(tokens, mask, np.zeros(tokens.shape, np.float32))


def format_page(tokenizer, batch, responses, other=None, width=100, colour=False) -> str:
    own, other = (
        rollout and Sampled("the student for opcd", rollout, rollout.mask_BxT) for rollout in (responses, other)
    )
    return batch_text.format_batch(Formatter(tokenizer, width, colour), batch, (END,), [own], other)


ENDED, CUT = ([A, END, PAD, PAD, PAD], 2), ([B] * 5, 5)


def test_both_views_are_written_token_by_token(tokenizer):
    text = format_page(tokenizer, make_batch([A, B], [B]), make_rollout(ENDED, CUT))
    assert "Shared context prefix: the first 5 tokens of every context prompt" in text
    assert "    <|begin|>│<|system|>│a│↵\n    <|user|>\n" in text
    assert "bare view, read by the student: 5 tokens, no padding\n    <|begin|>│<|user|>│a│b│<|assistant|>\n" in text
    assert "bare view, read by the student: 4 tokens after 1 of padding\n    <|begin|>│<|user|>│b│<|assi" in text
    assert "[the shared prefix, 5 tokens]\n    a│b│<|assistant|>\n" in text
    assert "first difference, token 2 is <|user|> (5) in the bare, <|system|> (4) in the context view" in text
    assert "A response ends at <|end|> (3)." in text
    assert re.search(r"bare +2 +5 +4 to 5 +10.0 %\ncontext +2 +8 +7 to 8 +6.2 %\n", text)


def test_the_mask_shows_which_tokens_are_trained_on(tokenizer):
    text = format_page(tokenizer, make_batch([A], [B]), make_rollout(ENDED, CUT))
    first, second = re.findall(r"response, .*\n    token +(.*)\n    id +(.*)\n    mask +(.*)", text)
    assert [re.split(" *│", row.rstrip()) for row in first] == [
        ["a", "<|end|>", "<|pad|>", "<|pad|>"], ["7", "3", "0", "0"], ["1", "1", "0", "0"],
    ]  # fmt: skip
    assert second == ("b│b│b│b│b", "8│8│8│8│8", "1│1│1│1│1")
    assert "2 of 5 columns are trained on, to the end token" in text
    assert "5 of 5 columns are trained on, cut at the limit" in text


def test_arms_that_learn_from_others_responses_or_from_fewer_tokens_have_their_own_lines(tokenizer):
    own, given = make_rollout(ENDED), make_rollout(CUT)
    later = Sampled("the teacher for opcd_warm", given, given.mask_BxT & (np.arange(5) >= 2))
    own = Sampled("the student for opcd", own, own.mask_BxT)
    text = batch_text.format_batch(Formatter(tokenizer, 100, False), make_batch([A]), (END,), [own, later], None)
    assert "response, sampled from the student for opcd: 2 of 5 columns are trained on, to the end token" in text
    _, teachers = text.split("response, sampled from the teacher for opcd_warm: 3 of 5 columns are trained on, cut")
    assert "    mask   0│0│1│1│1" in teachers


def test_a_response_with_its_end_token_in_the_last_column_is_not_cut(tokenizer):
    assert "2 of 2 columns are trained on, to the end token" in format_page(
        tokenizer, make_batch([A]), make_rollout(([A, END], 2))
    )


def test_rows_with_a_retention_prompt_show_it(tokenizer):
    other = [[BEGIN, SYSTEM, B, USER, A, ASSISTANT]]
    text = format_page(tokenizer, make_batch([A], [B], other=other), make_rollout(ENDED, CUT), make_rollout(CUT))
    _, _, after = text.partition("retention, another context, read by both: 6 tokens, no padding\n")
    assert after.startswith("    <|begin|>│<|system|>│b│<|user|>│a│<|assistant|>\n") and "retention, a" not in after
    assert "retention" not in format_page(tokenizer, make_batch([A], [B]), make_rollout(ENDED, CUT))


def test_equal_views_are_reported(tokenizer):
    same = make_batch([A], [B])
    assert "none, the teacher sees what the student sees" in format_page(
        tokenizer, same.replace(context=same.bare), make_rollout(ENDED, CUT)
    )


def test_colour_adds_only_escape_codes(tokenizer):
    arguments = tokenizer, make_batch([A, B], [B]), make_rollout(ENDED, CUT)
    plain, coloured = format_page(*arguments), format_page(*arguments, colour=True)
    assert "\033" not in plain and CODES.sub("", coloured) == plain
    assert "\033[35m<|user|>\033[0m" in coloured and re.search("\033\\[32ma *\033", coloured)


def test_terminal_escape_sequences_in_the_data_are_shown_not_sent(tokenizer):
    text = format_page(tokenizer, make_batch([ESCAPE]), make_rollout(ENDED))
    assert "\033" not in text and "│\\x1b[31m⇥│" in text


def test_tokens_that_are_part_of_a_character_are_shown_by_their_ids(smollm2):
    ids = smollm2("🙂ok", add_special_tokens=False)["input_ids"]
    line = Formatter(smollm2, 100, False).format_prompt(ids)[0].strip()
    assert line == "│".join([f"<{token}>" for token in ids[:-1]] + ["ok"]) and len(ids) > 2


@pytest.mark.parametrize("width", [30, 47, 100])
def test_lines_fit_the_width_and_lose_no_token(tokenizer, width):
    formatter, tokens = Formatter(tokenizer, width, False), [BEGIN, *[A, B, END] * 20, LINE, A]
    prompt, response = formatter.format_prompt(tokens), formatter.format_response(tokens, [True] * len(tokens))
    assert max(map(len, prompt + response)) <= width
    shown = [text for line in prompt for text in line.strip().split("│")]
    assert shown == [formatter.format_token(token) for token in tokens]
    ids = [cell.strip() for line in response if line.startswith("    id") for cell in line[11:].split("│")]
    assert ids == [str(token) for token in tokens]
