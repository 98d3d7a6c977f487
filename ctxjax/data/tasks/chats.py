"""Rows that are chats: a list of ``{"role": ROLE, "content": TEXT}`` in one column, as chat data sets have them."""

from __future__ import annotations

from typing import NamedTuple

from ctxjax.data.records import Reader, Record
from ctxjax.data.task import write_chat_context


class Chat(NamedTuple):
    """``record``: the row with the last user message in the column of the question and, if a response follows it, with
    this in the column of the reference. ``columns``: those of the row's own context. ``earlier``: as in Row."""

    record: Record
    columns: tuple[str, ...]
    earlier: tuple[tuple[str, str], ...] = ()


def read_chat(
    reader: Reader, record: Record, messages: str, question: str, reference: str, columns: tuple[str, ...]
) -> Chat | None:
    """Read the chat in the column ``messages``; with "" the row as it is. None if the reader left the row out.

    Users and assistants speak in turn, and a user speaks first. A system message comes before them; it is the row's
    context if ``columns`` names ``messages``, and otherwise refused, since it would be a context in every view.
    """
    if not messages:
        return Chat(record, columns)
    chat = _read_messages(reader, record, messages)
    if chat is None:
        return None
    texts, has_system = [text for _, text in chat], chat[0][0] == "system"
    if has_system and messages not in columns:
        why = f"the system message would be a context in every view; to internalize it, set context_column={messages}"
        reader.reject("not_text", record.where, f"column {messages!r}: {why}")
        return None
    said, value = texts[has_system:], dict(record.value)
    if len(said) % 2 == 0:
        value[reference] = said.pop()
    value[question] = said.pop()
    value[messages] = {"system": texts[0]} if has_system else {}
    own = tuple(f"{column}.system" if column == messages else column for column in columns)
    return Chat(record._replace(value=value), own, tuple(zip(said[::2], said[1::2])))


def read_teacher_chat(reader: Reader, record: Record, column: str) -> str | None:
    """Return the chat in a column, without a response at its end, as a context; None if the reader left the row out."""
    chat = _read_messages(reader, record, column)
    if chat is None:
        return None
    said = chat[:-1] if chat[-1][0] == "assistant" else chat
    return write_chat_context([{"role": role, "content": text} for role, text in said])


def _read_messages(reader: Reader, record: Record, column: str) -> list[tuple[str, str]] | None:
    """Return the (role, text) of each message in a column; None if the reader left the row out."""
    chat = record.value.get(column) if isinstance(record.value, dict) else None
    if not isinstance(chat, list) or not chat:
        kind = "missing" if chat is None or chat == [] else "not_text"
        reader.reject(kind, record.where, f"column {column!r} has no list of messages")
        return None
    roles = [message.get("role") if isinstance(message, dict) else None for message in chat]
    texts = [message.get("content") if isinstance(message, dict) else None for message in chat]
    why = _find_fault(roles[roles[0] == "system" :])
    if not why and any(not isinstance(text, str) or not text.strip() for text in texts):
        why = "a message has no text"
    if why:
        reader.reject("not_text", record.where, f"column {column!r}: {why}")
        return None
    if not all(reader.is_usable(text, record.where, f"no message in column {column!r}") for text in texts):
        return None
    return list(zip(roles, texts))


def _find_fault(roles: list[str | None]) -> str:
    """Return what is wrong with the order of the roles after a system message; "" if nothing is."""
    if "user" not in roles:
        return "it has no message with the role user"
    wanted = ["user", "assistant"] * len(roles)
    if roles != wanted[: len(roles)]:
        return f"the roles must be user and assistant in turn, beginning with user; they are {roles}"
    return ""
