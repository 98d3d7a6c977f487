"""A model writes the questions of task self_study: it reads a part of the context, and asks for it, brings a task that
it governs, or asks for something else. Then it answers each question with the context in its prompt. Some of these
conversations go on: the model writes what the user asks next, and answers that, too.

What is no single, finished question is thrown away, and so are repeats. Small models need several drafts for a question
that is kept; a line at the end says how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import itertools
import json
from pathlib import Path
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib, responses, splits
from ctxjax.data.contexts import Contexts, check_retention
from ctxjax.data.grading.graders import read_short
from ctxjax.data.grading.reasoning import strip_reasoning
from ctxjax.data.task import Row, describe_earlier
from ctxjax.data.tasks.self_study import (
    SelfStudyConfig,
    assign_split,
    check_without_questions,
    find_questions_file,
    make_id,
    name_context,
)
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.host import processes, progress, workdir as workdir_lib
from ctxjax.host.checksum import compute_digest
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder, open_folder
from ctxjax.types import Prompts

MOST_DRAFTS = 16  # drafts for each question that is wanted
LEAST_QUESTIONS = 48  # first ones of a conversation, of which dev gets a tenth, by hash
LONGEST_PART = 400  # characters of the context that a request quotes
FACT = 'Here is a fact: "{part}"\n'
ALONE = " Reply with the question alone."
ABOUT = (
    f"{FACT}Write a question whose answer is in this fact.{ALONE}",
    f"{FACT}Write a short question that this fact answers, in other words than the fact.{ALONE}",
    f'A user has not read this: "{{part}}"\nWhat would the user ask to learn it?{ALONE}',
)
TASK = 'An assistant works by this: "{part}"\nWrite a task for which it matters. Reply with the task alone.'
FOLLOW_UP = f"Write a question that I may ask you next, now that I know this.{ALONE}"
UNRELATED = f"Write a short question about {{topic}} that a user may ask an assistant.{ALONE}"
# A character inside of a sentence, such as the points of "2.5" and "Dr. Smith".
_INSIDE = r'(?:[^.?!:"\u201c\u201d\n]|[.:](?=\w)|(?:(?<=\bDr)|(?<=\bMr)|(?<=\bMrs)|(?<=\bMs)|(?<=\bSt))\.)'
TOPICS = (
    "animals", "books", "cooking", "football", "gardening", "geography", "health", "history", "languages",
    "mathematics", "money", "music", "physics", "programming", "travel", "the weather",
)  # fmt: skip


class Request(NamedTuple):
    """``row``: what the model is asked. ``context``: what is asked about. ``about``: the quoted part, or the topic.
    ``is_task``: a task is asked for, which need not be a question."""

    row: Row
    context: str
    about: str
    is_task: bool = False


class Asked(NamedTuple):
    """A question that is kept. ``row``: the conversation with the context, up to the question. ``request``: what it was
    written for."""

    row: Row
    request: Request


def ensure_questions(config: Experiment, mesh: Mesh) -> None:
    """Write the questions of task self_study if their file does not exist; for other tasks, nothing.

    Raises ValueError if the model writes too few, or if only some of several processes see the file. Settings that do
    not depend on the questions are checked before any is written: ValueError, FileNotFoundError or OSError.
    """
    task = config.task_config
    if not isinstance(task, SelfStudyConfig) or task.path:
        return
    path = find_questions_file(task)
    _check_settings(config)
    if processes.ask_all(not path.exists()):
        workdir_lib.ensure_writable(path.parent, "self_study.cache")
        print(f"{task.writer} writes questions about the context", flush=True)
        with jax.set_mesh(mesh):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in write_questions(config, path, mesh))
        workdir_lib.write_text_on_every_host(path, text)
        _find_drafts(path).unlink(missing_ok=True)
    if not processes.ask_all(path.exists()):
        raise ValueError(
            f"{path} exists on some hosts only; copy it to all, or set self_study.cache to a shared folder"
        )
    print(f"questions: {path}; edit a copy and give it as self_study.path to use others", flush=True)


def _check_settings(config: Experiment) -> None:
    """Raise ValueError or FileNotFoundError for settings that would else be refused once the questions are written."""
    task = config.task_config
    first = task.questions - _count_follow_ups(task)
    if first < LEAST_QUESTIONS:
        raise ValueError(
            f"self_study.questions = {task.questions} with follow_up_share = {task.follow_up_share} has {first} first "
            "questions, too few for dev, which gets a tenth of them; write more, so that there are at least "
            f"{LEAST_QUESTIONS}"
        )
    pool = check_without_questions(task)
    if config.has_retention:
        check_retention(pool.select("train"), config.task, task)


def _count_follow_ups(task: SelfStudyConfig) -> int:
    return round(task.questions * task.follow_up_share)


def _find_drafts(path: Path) -> Path:
    return path.with_suffix(".drafts")


def write_questions(config: Experiment, path: Path, mesh: Mesh) -> list[dict]:
    """Return the rows of the file: questions that differ, with the writer's replies.

    Drafts are kept in a file next to ``path``, batch by batch, so that an interrupted run goes on.
    """
    task = config.task_config
    writer, left_out = _Writer(config, _find_drafts(path), mesh), Counter()
    second = _count_follow_ups(task)
    asked, parts = writer.ask(list_requests(task), task.questions - second, left_out), _list_parts(task)
    seen = {(one.request.context, one.request.about) for one in asked} & {*parts}
    is_whole = writer.drafted >= len(parts)
    answered = writer.reply(asked, left_out)
    trained = [(asked, reply) for asked, reply in answered if assign_split(asked.row) == "train"]
    follow_ups = writer.ask([request_follow_up(asked, reply) for asked, reply in trained], second, left_out)
    answered += writer.reply(follow_ups, left_out)
    why = ", ".join(f"{name} {count}" for name, count in left_out.items() if count) or "none"
    drafted = f"{writer.drafted} drafts"
    print(f"{len(answered)} questions with replies, of {drafted}; left out: {why}", flush=True)
    more = "" if is_whole else "; not all were asked about: raise self_study.questions"
    print(f"they ask about {len(seen)} of {len(parts)} sentences and lines of the context{more}", flush=True)
    if len(answered) < task.questions // 2:
        raise ValueError(
            f"{task.writer} wrote {len(answered)} usable questions in {drafted} (left out: {why}), and "
            f"self_study.questions = {task.questions}; take a larger model as self_study.writer, lower "
            "self_study.questions, raise longest_question or longest_reference if texts are cut (a model that thinks "
            "needs more, or prompt.thinking=False), or give questions as self_study.path"
        )
    return [
        {"id": make_id(row), "question": row.question, "reference": reply, "about": request.about}
        | {"context": name_context(request.context)}
        | describe_earlier(row)
        for (row, request), reply in answered
    ]


def _has_words(reply: str) -> bool:
    """Whether a reply can be a reference: the grader compares words, and articles are none."""
    try:
        read_short(reply)
    except ValueError:
        return False
    return True


def split_parts(context: str) -> list[str]:
    """Return the sentences and lines of a context, without marks of lists and tables; the whole text if it has none."""
    parts = (part.strip(" -*#|\t") for part in re.split(r"(?<=[.!?])\s+|\n+", context))
    return [part[:LONGEST_PART] for part in parts if len(part.split()) > 2] or [context.strip()[:LONGEST_PART]]


def _list_parts(task: SelfStudyConfig) -> list[tuple[str, str]]:
    """Return (context, part) of all contexts."""
    contexts = Contexts(task, "self_study").texts.values()
    return [(context, part) for context in contexts for part in split_parts(context)]


def list_requests(task: SelfStudyConfig) -> list[Request]:
    """Return what the writer is asked, in order. A request depends on the seed and its number only."""
    parts, requests = _list_parts(task), []
    order = np.random.default_rng(task.seed).permutation(len(parts))  # a few questions are about all of a long context
    for number in range(MOST_DRAFTS * task.questions):
        generator = np.random.default_rng([task.seed, number])
        context, part = parts[order[number % len(parts)]]  # every part in turn
        form = generator.integers(len(ABOUT) + 1)
        is_task = bool(form == len(ABOUT))
        about, shown, text = part, context, (TASK if is_task else ABOUT[form]).format(part=part)
        if generator.random() < task.unrelated_share:
            about = TOPICS[generator.integers(len(TOPICS))]
            shown, text, is_task = None, UNRELATED.format(topic=about), False
        requests.append(Request(Row(str(number), text, shown, ""), context, about, is_task))
    return requests


def request_follow_up(asked: Asked, reply: str) -> Request:
    """Return what the writer is asked once it has replied: the next turn of the same conversation."""
    row, request = asked
    turns = (*row.earlier, (row.question, reply))
    follow_up = Row(f"{request.row.id}, next", FOLLOW_UP, request.row.context, "", earlier=turns)
    return request._replace(row=follow_up, is_task=False)


def clean_question(text: str, request: Request) -> str | None:
    """Return the first question of a draft, or the first sentence of a task; None if there is none that could be asked
    by itself."""
    text = strip_reasoning(text)[0]
    end = r"(?:[.?!]|\n|\Z)" if request.is_task else r"\?"
    found = re.search(rf"{_INSIDE}*\w{_INSIDE}*{end}", text)
    if not found or found[0][0].isspace() and text[: found.start()].endswith(('"', "\u201d")):
        return None  # or the rest of a sentence, after a quotation in it
    said = found[0].strip(" '*`-,\n")
    is_about_text = re.search(r"(?i)\b(?:facts?|text|users?|ask|answers?|questions?)\b", said)
    is_part = request.row.context is not None and splits.normalize(request.about) in splits.normalize(said)
    return None if is_about_text or is_part or len(said.split()) < 3 else said[0].upper() + said[1:]


class _Writer:
    """The model that writes. ``drafted``: how many drafts have been read."""

    def __init__(self, config: Experiment, drafts: Path, mesh: Mesh):
        self._config, self._task, self._drafts, self._mesh = config, config.task_config, drafts, mesh
        dtype, frozen = config.model.dtype, config.teacher.param_dtype
        self._folder = open_folder(self._task.writer, mesh, dtype, frozen, attention=config.model.attention)
        self._stored = _read_common_lines(drafts)
        self.drafted, self._batches = 0, 0

    def ask(self, requests: list[Request], wanted: int, left_out: Counter) -> list[Asked]:
        """Return at most ``wanted`` questions that differ, in the order of ``requests``; count the others by cause."""
        kept: dict[str, Asked] = {}
        if not wanted or not requests:
            return []
        with progress.Bar("writing questions", wanted, "question", compiles=True) as bar:
            for request, text in zip(requests, self._draft(requests)):
                self.drafted += 1
                question = clean_question(text, request)
                row = request.row._replace(question=question or "", context=request.context)
                key = splits.normalize(row.conversation)
                if not question:
                    left_out["without a question" if text else "cut"] += 1
                elif key in kept:
                    left_out["repeats"] += 1
                elif not assign_split(row):
                    left_out["held out"] += 1
                else:
                    kept[key] = Asked(row, request)
                    bar.update(1)
                if len(kept) == wanted:
                    break
        return list(kept.values())

    def reply(self, asked: list[Asked], left_out: Counter) -> list[tuple[Asked, str]]:
        """Return the questions with the writer's greedy replies with the context, without their reasoning. Replies are
        left out that are cut at ``longest_reference`` tokens, reasoning included, or that have no word."""
        if not asked:
            return []
        sampling = SamplingConfig(self._task.longest_reference, self._folder.stop_ids, self._folder.pad_id, 0.0)
        prompts = decoding.pad_prompts(
            self._encode([row for row, _ in asked], "longest_reference"), self._folder.pad_id
        )
        key = rng.key_for(jax.random.key(self._task.seed), 0, "evaluation")
        texts = _decode(
            self._folder, prompts, sampling, key, self._config.eval.batch_size, self._mesh, "answering them"
        )
        replies = [strip_reasoning(text)[0] for text in texts]
        left_out["replies that are cut"] += sum(not reply for reply in replies)
        left_out["replies without a word"] += sum(bool(reply) and not _has_words(reply) for reply in replies)
        return [(one, reply) for one, reply in zip(asked, replies) if reply and _has_words(reply)]

    def _draft(self, requests: list[Request]) -> Iterator[str]:
        """Yield the draft of each request, in order; "" for one that is cut at ``longest_question`` tokens.

        Requests with a context are drafted in batches without others, so that the context is read once per batch.
        """
        rows = [request.row for request in requests]
        shown, alone = (
            itertools.chain.from_iterable(self._draft_alike([row for row in rows if (row.context is None) == is_alone]))
            for is_alone in (False, True)
        )
        for row in rows:
            yield next(alone if row.context is None else shown)

    def _draft_alike(self, rows: list[Row]) -> Iterator[list[str]]:
        """Yield drafts batch by batch, in the order of ``rows``; those of an earlier start from their file.

        A batch is encoded when it is decoded: all prompts together would hold a long context once for each.
        """
        task, size = self._task, self._config.eval.batch_size
        sampling = SamplingConfig(task.longest_question, self._folder.stop_ids, self._folder.pad_id, task.temperature)
        start, extremes = 0, None
        while start < len(rows):
            if self._batches < len(self._stored):
                texts = json.loads(self._stored[self._batches])  # an earlier start may have had another size
            else:
                extremes = extremes or self._encode(self._choose_extremes(rows), "longest_question")
                tokens = self._encode(rows[start : start + size], "longest_question")
                prompts = decoding.pad_prompts(tokens, self._folder.pad_id, extremes)
                key = rng.key_for(jax.random.key(task.seed), self._batches, "questions")
                texts = _decode(self._folder, prompts, sampling, key, size, self._mesh)
                self._stored.append(json.dumps(texts))
                workdir_lib.write_text_on_every_host(self._drafts, "".join(f"{line}\n" for line in self._stored))
            start, self._batches = start + len(texts), self._batches + 1
            yield texts

    def _choose_extremes(self, rows: list[Row]) -> list[Row]:
        """Return rows whose prompts say what all prompts start with and how long they get: in the order of their tokens
        the first and the last, and the longest. All are encoded for this, but without the context, so they are short.
        """
        different = list(dict.fromkeys(row._replace(id="") for row in rows))
        bare = [row._replace(context=None) for row in different]
        own = dict(zip(different, prompts_lib.encode(self._folder.tokenizer, bare, self._config.prompt)))
        ends = [choose(different, key=lambda row: (row.context or "", own[row])) for choose in (min, max)]
        return [*ends, max(different, key=lambda row: (len(row.context or ""), len(own[row])))]

    def _encode(self, rows: list[Row], limit: str) -> list[list[int]]:
        """Return the prompts, which leave room for the tokens that the field ``limit`` of the section allows."""
        tokens = prompts_lib.encode(self._folder.tokenizer, rows, self._config.prompt)
        self._folder.check_prompts(tokens, getattr(self._task, limit), f"self_study.{limit}")
        return tokens


def _read_common_lines(path: Path) -> list[str]:
    """Return the lines that the file has on every host: one that was killed may lack the last, and a new one all.

    Raises ValueError if they differ: processes would decode different batches, and wait for each other.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = lines[: processes.find_least(len(lines))]
    processes.check_same_facts({path.name: compute_digest(lines)})
    return lines


def _decode(
    folder: ModelFolder, prompts: Prompts, sampling: SamplingConfig, key, size: int, mesh: Mesh, what: str = ""
) -> list[str]:
    """Return the responses as text; "" for those that are cut."""
    rollout = decoding.decode(folder.params, folder.config, sampling, prompts, key, size, mesh, what=what)
    kept = [ids[mask] for ids, mask in zip(rollout.tokens_BxT, rollout.mask_BxT)]
    texts = responses.decode(folder.tokenizer, kept, folder.stop_ids)
    return [text if int(ids[-1]) in folder.stop_ids else "" for ids, text in zip(kept, texts)]
