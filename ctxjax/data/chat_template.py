"""Apply a tokenizer's chat template: its date, its other variables, and what it refuses."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import jinja2

DATE_FORMAT = "%d %b %Y"  # as Llama 3.1 and 3.2 write it
# The strftime directives that templates may use; the time of day is midnight.
_DIRECTIVES = ("-d", "-m", *"aAbBcdDeFGHIjmMpSuUVwWxXyY")
# Variable that no keyword may set -> what sets it.
_TAKEN = {
    "enable_thinking": "prompt.thinking or prompt.teacher_thinking", "date_string": "prompt.date",
    "messages": "the rows", "add_generation_prompt": "every prompt",
}  # fmt: skip
_KEYWORDS = "prompt.keywords or prompt.teacher_keywords"


def parse_date(text: str) -> datetime.date:
    """Parse a date such as "26 Jul 2024". Raises ValueError for anything else: the clock is no substitute."""
    try:
        return datetime.datetime.strptime(text, DATE_FORMAT).date()
    except ValueError:
        raise ValueError(
            f"prompt.date = {text!r} is not a date such as '26 Jul 2024'; templates write it as today's date, so that "
            "the prompts of a run are the same every day"
        ) from None


def parse_keyword(text: str) -> tuple[str, Any]:
    """Return name and value of "NAME=VALUE". The value is read as JSON if it is JSON (true, 3, "low"), else as a text.

    Raises ValueError if it has another form, or if the name is one that prompts set themselves.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{_KEYWORDS}: {text!r} must be NAME=VALUE, a variable of the chat template")
    if name in _TAKEN:
        raise ValueError(f"{_KEYWORDS}: {text!r} is no keyword, since {_TAKEN[name]} sets {name}; leave it out")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def apply(tokenizer, chat: list[dict[str, str]], date: str, variables: dict[str, Any], opens_turn: bool = True) -> str:
    """Render a chat, with ``date`` in place of the clock and ``variables`` as the template's.

    ``opens_turn``: write the marker that opens the assistant's turn. Raises ValueError if the template refuses the
    chat, or does not read one of the variables.

    Templates get the date in two ways: from the variable ``date_string`` or, if it is not set, from the function
    ``strftime_now``. A variable cannot replace a function, so a macro with that name is put before the template.
    """
    day = parse_date(date)
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        filled = "".join(f"|replace('%{d}', '{day.strftime(f'%{d}')}')" for d in _DIRECTIVES)
        template = f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"
    for name in variables:
        if not re.search(rf"\b{name}\b", template):
            fields = _TAKEN.get(name, _KEYWORDS)
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} does not read {name}, so {fields} would change "
                "nothing; leave it unset, or take a model whose template has this switch"
            )
    try:
        return tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=opens_turn,
            date_string=day.strftime(DATE_FORMAT),
            **variables,
        )
    except jinja2.TemplateError as error:
        named = {"system": "a system message", "user": "a user message", "assistant": "an earlier response"}
        roles = " and ".join(dict.fromkeys(named[message["role"]] for message in chat))
        remedy = (
            "; set prompt.placement=user, or write it into the user's message" if chat[0]["role"] == "system" else ""
        )
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses {roles}: {error}{remedy}") from None
