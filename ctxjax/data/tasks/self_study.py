"""A context and no questions: a model has written the questions itself, and answered them with the context.

The questions are in a file of JSON lines, which a run writes if it does not exist (inputs/question_writer.py). It may
be edited, and given again with ``self_study.path``::

    {"id": "...", "question": "What is the capital?", "reference": "It is Ironstone.", "about": "The capital is ..."}

The reference is the writer's own reply with the context. A response agrees with it if it has most of the words that the
reply adds to the question (graders.grade_new_words): all replies to "What is the capital of Crystalwater?" share the
others. Accuracy is agreement with the teacher, not truth. If the context demands something of every reply that can be
checked (``self_study.check``), accuracy is obedience to this demand instead.

The second turn of a conversation has the first one as ``"earlier": [[QUESTION, REPLY]]``. ``"context"`` names the
context that a question was written for (``name_context``), which matters if there are several.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path

from ctxjax.data import splits
from ctxjax.data.contexts import ContextConfig, Contexts, OtherContexts
from ctxjax.data.grading import graders
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.response_checks import grade_check, read_check
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.records import Reader, Record, hash_text
from ctxjax.data.task import Row
from ctxjax.data.tasks.file_task import FileTask, FileTaskConfig, Question
from ctxjax.types import bounded

# Part of a file's name: increase it when the requests, their batches or the filter change.
RECIPE = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfStudyConfig(ContextConfig, FileTaskConfig):
    """See configs/base.py, ``config.self_study``."""

    writer: str
    questions: int = bounded(at_most=1_000_000)
    follow_up_share: float = bounded(zero=True, at_most=0.5)
    unrelated_share: float = bounded(zero=True, at_most=1.0)
    temperature: float = bounded(at_most=100.0)
    longest_question: int = bounded(at_most=10_000)
    longest_reference: int = bounded(at_most=100_000)
    seed: int = bounded(zero=True)
    cache: str
    check: str
    prompt: PromptConfig = PromptConfig()


class SelfStudy(FileTask):
    """The task over the written questions. A question's split follows from its hash.

    A second turn is for training only: it has a reply before it that was written with the context, which would then be
    in the view without one. It is left out if a question of its conversation is held out.
    """

    def __init__(self, config: SelfStudyConfig):
        self._check = read_check(config.check, "self_study.check")
        self._about: dict[str, str] = {}
        super().__init__(config, "self_study", Contexts(config, "self_study"))

    def open_pool(self, reader: Reader, internalized: list[str]) -> OtherContexts:
        return _open_pool(self.config, reader, internalized)

    def read_questions(self, reader: Reader) -> Iterator[tuple[str, str, Question]]:
        path = find_questions_file(self.config)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: no questions have been written for this context and self_study.writer = "
                f"{self.config.writer!r} yet. Training writes them; or give a file as self_study.path"
            )
        contexts = {name_context(text): text for text in self.contexts.texts.values()}
        for record in reader.read(path, 0, "self_study.path"):
            texts = reader.get_texts(record, "question")
            reference = texts and reader.get_reference(record, "reference", graders.read_short)
            earlier = _read_earlier(reader, record) if reference else None
            if earlier is not None:
                row = Row("", texts[0], None, reference, earlier=earlier)
                row_id, split, context = make_id(row), assign_split(row), _find_context(contexts, record)
                if split:
                    self._about[row_id] = str(record.value.get("about") or "")
                    new = graders.find_new_words(reference, row.question)
                    yield split, row_id, Question(row.conversation, row.question, new, context, earlier)

    def rows_under(self, row: Row, context: str) -> list[Row]:
        """Return the conversation's first question under another context, which has not been obeyed in a reply yet."""
        first = row.earlier[0][0] if row.earlier else row.question
        return super().rows_under(row._replace(question=first, earlier=()), context)

    def group(self, row: Row) -> str:
        """What the question was written about."""
        return self._about[row.id]

    def make_row(self, row_id: str, question: Question) -> Row:
        return super().make_row(row_id, question)._replace(check=self._check)

    def grade(self, response: str, reference: str) -> Grade:
        return grade_check(self._check, response) if self._check else graders.grade_new_words(response, reference)


def check_without_questions(config: SelfStudyConfig) -> OtherContexts:
    """Check what does not depend on the questions, and return the other contexts.

    Raises ValueError or FileNotFoundError for the context, ``check`` or ``other_contexts_file``, as ``SelfStudy`` does.
    """
    read_check(config.check, "self_study.check")
    contexts = Contexts(config, "self_study")
    return _open_pool(config, Reader(config.records), list(contexts.texts.values()))


def _open_pool(config: SelfStudyConfig, reader: Reader, internalized: list[str]) -> OtherContexts:
    pool = OtherContexts(config, "self_study", reader, internalized)
    pool.require_checks("self_study.other_contexts_file")
    return pool


def assign_split(row: Row) -> str | None:
    """Return the split of a conversation. None for one of several turns if any of its questions is held out."""
    asked = [*(said for said, _ in row.earlier), row.question]
    found = {splits.assign_split(splits.normalize(question)) for question in asked}
    return found.pop() if not row.earlier or found == {"train"} else None


def make_id(row: Row) -> str:
    """Return the id of a conversation."""
    return hash_text(splits.normalize(row.conversation))[:16]


def name_context(text: str) -> str:
    return hash_text(text)[:16]


def _find_context(contexts: dict[str, str], record: Record) -> str | None:
    """Return the one of several contexts that the question was written for; None if it does not say so, or if there is
    at most one."""
    name = record.value.get("context")
    if name is None or len(contexts) < 2:
        return None
    if name not in contexts:
        raise ValueError(
            f"{record.where} was written for another context ({name!r}); give self_study.context_files as they were, "
            'or remove "context" from the rows, so that one of them is drawn for each question'
        )
    return contexts[name]


def _read_earlier(reader: Reader, record: Record) -> tuple[tuple[str, str], ...] | None:
    """Return the turns before the question; None if the reader left the row out."""
    turns = record.value.get("earlier") or []
    is_list = isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if not is_list or not all(isinstance(text, str) and text.strip() for turn in turns for text in turn):
        why = "earlier must be a list of turns, [what the user said, the reply] each, which are texts"
        reader.reject("not_text", record.where, why)
        return None
    if not all(reader.is_usable(text, record.where, "no text in earlier") for turn in turns for text in turn):
        return None
    return tuple((said, reply) for said, reply in turns)


def find_questions_file(config: SelfStudyConfig) -> Path:
    """Return the file of the questions, which need not exist yet: ``path``, or a file of the cache.

    Its name has a hash of everything that determines the questions: the contexts, the writer's name, the settings, and
    how prompts are written.
    """
    if config.path:
        return Path(config.path).expanduser()
    names = (
        "writer", "questions", "follow_up_share", "unrelated_share", "temperature", "longest_question",
        "longest_reference", "seed",
    )  # fmt: skip
    facts = {name: getattr(config, name) for name in names} | {"recipe": RECIPE}
    facts["contexts"] = list(Contexts(config, "self_study").texts.values())
    limits = ("max_bare_tokens", "max_context_tokens", "overlong")  # which rows of a file are asked
    facts["prompt"] = {name: value for name, value in dataclasses.asdict(config.prompt).items() if name not in limits}
    digest = hash_text(json.dumps(facts, sort_keys=True))[:16]
    return Path(config.cache).expanduser() / f"questions-{digest}.jsonl"
