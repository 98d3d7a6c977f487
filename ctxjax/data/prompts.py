"""Text to tokens: chat template, placement of the context, left padding. Nothing is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import datetime
import itertools

import jinja2
import numpy as np

from ctxjax.data.task import Row
from ctxjax.types import Prompts

PLACEMENTS = ("system", "user", "prefix")
DATE_FORMAT = "%d %b %Y"  # as Llama 3.1 and 3.2 write it
# What templates may ask of a date; the time of day is midnight.
_DIRECTIVES = ("-d", "-m", *"aAbBcdDeFGHIjmMpSuUVwWxXyY")
# Prefixes shorter than this many tokens are read in every row. On one core an update of the tiny world with a context
# of 8, 16, 32 and 64 tokens takes 1.02, 1.22, 1.49 and 2.03 times as long so; but an accelerator's pass over a few
# tokens costs as much as one over hundreds, since it reads all weights.
SHORTEST_PREFIX = 32


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """``placement``: the context is the "system" message, stands in the "user" turn ahead of the question, or is a
    "prefix": raw text before the whole chat, behind the begin token where the template writes one.
    ``date`` is the day that the template takes for today, and ``thinking`` its switch ``enable_thinking`` (None:
    not given, so the template's default holds); templates without either ignore them.
    ``max_bare_tokens`` and ``max_context_tokens`` bound a prompt's length with the template's tokens, 0: as
    long as the longest row. ``overlong``: a longer row is an "error", or "drop": left out, and counted."""

    placement: str = "system"
    date: str = "26 Jul 2024"
    thinking: bool | None = None
    max_bare_tokens: int = 0
    max_context_tokens: int = 0
    overlong: str = "error"


def parse_date(text: str) -> datetime.date:
    """The day that "26 Jul 2024" names. Raises ValueError for anything else: the clock must not stand in."""
    try:
        return datetime.datetime.strptime(text, DATE_FORMAT).date()
    except ValueError:
        raise ValueError(
            f"prompt.date = {text!r} is not a date such as '26 Jul 2024'; templates that write today's date get this "
            "one, so that a run reads the same prompts on every day"
        ) from None


def messages(row: Row, placement: str) -> list[dict[str, str]]:
    """The chat of a row. A context of None leaves the template its own default; "" is an empty block.

    A "prefix" is no part of the chat, and an empty one in the user's turn adds nothing to it.
    """
    user = {"role": "user", "content": row.question}
    if row.context is None or placement == "prefix":
        return [user]
    if placement == "system":
        return [{"role": "system", "content": row.context}, user]
    return [{"role": "user", "content": f"{row.context}\n\n{row.question}" if row.context else row.question}]


def render(tokenizer, row: Row, config: PromptConfig) -> str:
    """The prompt's text up to and including the marker that opens the assistant's turn.

    Raises ValueError where the template refuses the chat, or leaves the context out.
    """
    text = _apply(tokenizer, messages(row, config.placement), config)
    if not row.context:
        return text
    if config.placement == "prefix":
        begin = _begin(tokenizer, config)
        return begin + row.context + text[len(begin) :]
    # A question may quote the context, so it is counted; templates commonly strip what they are given.
    context = row.context.strip()
    if text.count(context) <= row.question.count(context):
        raise ValueError(
            f"row {row.id!r}: the chat template of {tokenizer.name_or_path} leaves out the context, or changes its "
            f"text, where prompt.placement = {config.placement!r}; the teacher would not see it. Set prompt.placement "
            "to another of " + ", ".join(PLACEMENTS)
        )
    return text


def encode(tokenizer, rows: list[Row], config: PromptConfig) -> list[list[int]]:
    """Token ids of every row's prompt."""
    texts = [render(tokenizer, row, config) for row in rows]
    # The template has written the special tokens; the tokenizer must not add them a second time.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def ignores_thinking(tokenizer, config: PromptConfig) -> bool:
    """True where ``config.thinking`` is given and the template writes the same for either value."""
    if config.thinking is None:
        return False
    texts = {_probe(tokenizer, dataclasses.replace(config, thinking=value)) for value in (True, False)}
    return len(texts) == 1


def _probe(tokenizer, config: PromptConfig) -> str:
    """What the template writes around a question, whatever the question."""
    return _apply(tokenizer, [{"role": "user", "content": "?"}], config)


def _begin(tokenizer, config: PromptConfig) -> str:
    """The begin token's text, where the template opens the chat with it; "" where it does not.

    In some ChatML tokenizers the "begin token" is the one that opens every turn: that one belongs to its turn.
    """
    begin, text = tokenizer.bos_token or "", _probe(tokenizer, config)
    return begin if begin and text.startswith(begin) and text.count(begin) == 1 else ""


def _apply(tokenizer, chat: list[dict[str, str]], config: PromptConfig) -> str:
    """The chat in the tokenizer's template, which never sees the clock.

    Templates learn the date in two ways: from the variable ``date_string`` or, where nobody sets it, from the function
    ``strftime_now``. A variable cannot replace a function, so a macro of that name is put before the template.
    """
    date = parse_date(config.date)
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        filled = "".join(f"|replace('%{d}', '{date.strftime(f'%{d}')}')" for d in _DIRECTIVES)
        template = f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"
    settings = {} if config.thinking is None else {"enable_thinking": config.thinking}
    try:
        return tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=date.strftime(DATE_FORMAT),
            **settings,
        )
    except jinja2.TemplateError as error:
        roles = " and ".join(f"a {message['role']} message" for message in chat)
        remedy = "; set prompt.placement=user" if chat[0]["role"] == "system" else ""
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses {roles}: {error}{remedy}") from None


def common_prefix(token_lists: list[list[int]]) -> list[int]:
    """The longest run of tokens that all lists begin with: of prompts under one context, the context's share."""
    # Where any two lists part, the first and the last in order do too, and no earlier.
    pairs = zip(min(token_lists), max(token_lists))
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def shared_prefix(token_lists: list[list[int]]) -> list[int]:
    """The tokens that all prompts start with, to be read once for all of them; [] where that saves too little.

    Each prompt keeps a token of its own, from which its response is predicted. A template's head of a few tokens is
    not worth the pass of its own through all layers that reading it apart costs.
    """
    if len(token_lists) < 2:
        return []
    prefix = common_prefix(token_lists)[: min(len(ids) for ids in token_lists) - 1]
    return prefix if len(prefix) >= SHORTEST_PREFIX else []


def left_pad(token_lists: list[list[int]], length: int, pad_id: int, prefix: Sequence[int] = ()) -> Prompts:
    """Prompts of ``length`` tokens as numpy arrays; every row ends in the last column.

    ``prefix`` is what all rows start with: it is kept apart, and the columns hold the rest. Raises ValueError where a
    row is longer than ``length``: prompts are not cut; or where one does not start with the prefix.
    """
    prefix = list(prefix)
    columns = length - len(prefix)
    tokens = np.full((len(token_lists), columns), pad_id, np.int32)
    mask = np.zeros((len(token_lists), columns), bool)
    for row, ids in enumerate(token_lists):
        if len(ids) > length:
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit into {length} columns")
        if ids[: len(prefix)] != prefix:
            raise ValueError(f"prompt {row} does not start with the {len(prefix)} tokens that all prompts should share")
        own = ids[len(prefix) :]
        if own:
            tokens[row, columns - len(own) :] = own
            mask[row, columns - len(own) :] = True
    return Prompts(tokens, mask, np.asarray(prefix, np.int32) if prefix else None)


def token_lists(prompts: Prompts) -> list[list[int]]:
    """The inverse of ``left_pad``: every row's tokens without padding, behind the prefix where there is one."""
    prefix = [] if prompts.prefix_C is None else prompts.prefix_C.tolist()
    return [prefix + tokens[mask].tolist() for tokens, mask in zip(prompts.tokens_BxP, prompts.mask_BxP)]


def expand_prefix(prompts: Prompts, pad_id: int) -> Prompts:
    """The same prompts with their prefix in every row."""
    shared = 0 if prompts.prefix_C is None else len(prompts.prefix_C)
    return left_pad(token_lists(prompts), shared + prompts.tokens_BxP.shape[1], pad_id)


def keep_fitting(
    rows: list[Row], views: dict[str, list[list[int]]], config: PromptConfig
) -> tuple[list[int], dict[str, int]]:
    """The places of the rows that fit in every view, and the length of each view's prompts.

    ``views`` has "bare" and "context" token lists, parallel to ``rows``. Raises ValueError naming the first
    row that is too long where ``overlong`` is "error", or where no row is left.
    """
    limits = {"bare": config.max_bare_tokens, "context": config.max_context_tokens}
    kept = []
    for place, row in enumerate(rows):
        long = [
            (view, len(views[view][place])) for view, limit in limits.items() if 0 < limit < len(views[view][place])
        ]
        if not long:
            kept.append(place)
        elif config.overlong == "error":
            view, length = long[0]
            raise ValueError(
                f"row {row.id!r}: its {view} prompt has {length} tokens, more than prompt.max_{view}_tokens = "
                f"{limits[view]}; raise the limit, or set prompt.overlong=drop to leave such rows out"
            )
    if not kept:
        raise ValueError(f"none of {len(rows)} rows fits into prompt.max_bare_tokens and prompt.max_context_tokens")
    longest = {view: max(len(views[view][place]) for place in kept) for view in limits}
    return kept, {view: limits[view] or longest[view] for view in limits}
