"""A model writes the questions of task self_study: it reads a part of the context, and asks for it, brings a task that
it governs, or asks what a user who knows it asks next; or it asks for something else. Then it answers each question
with the context in its prompt.

What is no single, finished question is thrown away, and so are repeats. Small models need several drafts for a question
that is kept; a line at the end says how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
from ctxjax.data.contexts import Contexts
from ctxjax.data.grading.graders import read_short, strip_reasoning
from ctxjax.data.records import hash_text
from ctxjax.data.task import Row
from ctxjax.data.tasks.self_study import SelfStudyConfig, find_questions_file
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.host import processes, progress, workdir as workdir_lib
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder, open_folder
from ctxjax.types import Prompts

MOST_DRAFTS = 16  # drafts for each question that is wanted
LEAST_QUESTIONS = 48  # of which dev gets a tenth, by hash
LONGEST_PART = 400  # characters of the context that a request quotes
FACT = 'Here is a fact: "{part}"\n'
ALONE = " Reply with the question alone."
ABOUT = (
    f"{FACT}Write a question whose answer is in this fact.{ALONE}",
    f"{FACT}Write a short question that this fact answers, in other words than the fact.{ALONE}",
    f'A user has not read this: "{{part}}"\nWhat would the user ask to learn it?{ALONE}',
    f'An assistant has just told a user this: "{{part}}"\nWrite what the user asks next.{ALONE}',
)
TASK = 'An assistant works by this: "{part}"\nWrite a task for which it matters. Reply with the task alone.'
UNRELATED = f"Write a short question about {{topic}} that a user may ask an assistant.{ALONE}"
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


def ensure_questions(config: Experiment, mesh: Mesh) -> None:
    """Write the questions of task self_study if their file does not exist; for other tasks, nothing.

    Raises ValueError if the model writes too few, or if only some of several processes see the file.
    """
    task = config.task_config
    if not isinstance(task, SelfStudyConfig) or task.path:
        return
    path = find_questions_file(task)
    if task.questions < LEAST_QUESTIONS:
        raise ValueError(
            f"self_study.questions = {task.questions} leaves no question for dev, which gets a tenth of them; write at "
            f"least {LEAST_QUESTIONS}"
        )
    if processes.ask_all(not path.exists()):
        print(f"{task.writer} writes questions about the context", flush=True)
        with jax.set_mesh(mesh):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in write_questions(config, path, mesh))
        if processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            workdir_lib.write_text(path, text)
            _find_drafts(path).unlink(missing_ok=True)
        processes.wait("questions")
    if not processes.ask_all(path.exists()):
        raise ValueError(
            f"{path} exists on some hosts only; copy it to all, or set self_study.cache to a shared folder"
        )
    print(f"questions: {path}; edit a copy and give it as self_study.path to use others", flush=True)


def _find_drafts(path: Path) -> Path:
    return path.with_suffix(".drafts")


def write_questions(config: Experiment, path: Path, mesh: Mesh) -> list[dict[str, str]]:
    """Return the rows of the file: questions that differ, with the writer's replies.

    Drafts are kept in a file next to ``path``, batch by batch, so that an interrupted run goes on.
    """
    task = config.task_config
    dtype, frozen = config.model.dtype, config.teacher.param_dtype
    folder = open_folder(task.writer, mesh, dtype, frozen, attention=config.model.attention)
    requests = list_requests(task)
    kept: dict[str, tuple[Request, str]] = {}
    drafted, left_out = 0, Counter()
    with progress.Bar("writing questions", task.questions, "question", compiles=True) as bar:
        for texts in _draft(config, folder, requests, _find_drafts(path), mesh):
            for request, text in zip(requests[drafted : drafted + len(texts)], texts):
                question = clean_question(text, request)
                key = question and splits.normalize(question)
                if not question:
                    left_out["without a question" if text else "cut"] += 1
                elif key in kept:
                    left_out["repeats"] += 1
                elif len(kept) < task.questions:
                    kept[key] = request, question
            drafted += len(texts)
            bar.update(len(kept) - bar.n)
            if len(kept) == task.questions:
                break
    replies = _reply(config, folder, list(kept.values()), mesh)
    rows = [
        {"id": hash_text(key)[:16], "question": question, "reference": reply, "about": request.about}
        for (key, (request, question)), reply in zip(kept.items(), replies)
        if reply and _has_words(reply)
    ]
    left_out["replies that are cut"] = sum(not reply for reply in replies)
    left_out["replies without a word"] = sum(bool(reply) and not _has_words(reply) for reply in replies)
    why = ", ".join(f"{name} {count}" for name, count in left_out.items() if count) or "none"
    print(f"{len(rows)} questions with replies, of {drafted} drafts; left out: {why}", flush=True)
    if len(rows) < task.questions // 2:
        raise ValueError(
            f"{task.writer} wrote {len(rows)} usable questions in {drafted} drafts (left out: {why}), and "
            f"self_study.questions = {task.questions}; take a larger model as self_study.writer, lower "
            "self_study.questions, raise longest_question or longest_reference if texts are cut, or give questions as "
            "self_study.path"
        )
    return rows


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


def list_requests(task: SelfStudyConfig) -> list[Request]:
    """Return what the writer is asked, in order. A request depends on the seed and its number only."""
    contexts = list(Contexts(task, "self_study").texts.values())
    parts = [(context, part) for context in contexts for part in split_parts(context)]
    requests = []
    for number in range(MOST_DRAFTS * task.questions):
        generator = np.random.default_rng([task.seed, number])
        context, part = parts[number % len(parts)]  # every part in turn
        form = generator.integers(len(ABOUT) + 1)
        is_task = bool(form == len(ABOUT))
        about, shown, text = part, context, (TASK if is_task else ABOUT[form]).format(part=part)
        if generator.random() < task.unrelated_share:
            about = TOPICS[generator.integers(len(TOPICS))]
            shown, text, is_task = None, UNRELATED.format(topic=about), False
        requests.append(Request(Row(str(number), text, shown, ""), context, about, is_task))
    return requests


def clean_question(text: str, request: Request) -> str | None:
    """Return the first question of a draft, or the first sentence of a task; None if there is none that could be asked
    by itself."""
    end = r"(?:[.?!]|\n|\Z)" if request.is_task else r"\?"
    found = re.search(rf'[^.?!:"\u201c\u201d\n]*\w[^.?!:"\u201c\u201d\n]*{end}', strip_reasoning(text)[0])
    said = found[0].strip(" '*`-,\n") if found else ""
    is_about_text = re.search(r"(?i)\b(?:facts?|text|users?|ask|answers?|questions?)\b", said)
    is_part = splits.normalize(request.about) in splits.normalize(said)
    return None if is_about_text or is_part or len(said.split()) < 3 else said[0].upper() + said[1:]


def _draft(
    config: Experiment, folder: ModelFolder, requests: list[Request], drafts: Path, mesh: Mesh
) -> Iterator[list[str]]:
    """Yield drafts batch by batch, in the order of ``requests``; those of an earlier start from their file.

    A draft that is cut at ``longest_question`` tokens is "".
    """
    task, size = config.task_config, config.eval.batch_size
    stored = drafts.read_text(encoding="utf-8").splitlines() if drafts.exists() else []
    sampling = SamplingConfig(task.longest_question, folder.stop_ids, folder.pad_id, task.temperature)
    tokens = prompts_lib.encode(folder.tokenizer, [request.row for request in requests], config.prompt)
    folder.check_prompts(tokens, task.longest_question, "self_study.longest_question")
    prompts = decoding.pad_prompts(tokens, folder.pad_id)
    before = [json.loads(line) for line in stored]  # an earlier start may have had another size
    yield from before
    for start in range(sum(map(len, before)), len(requests), size):
        key = rng.key_for(jax.random.key(task.seed), len(stored), "rollout")
        texts = _decode(folder, decoding.take_rows(prompts, slice(start, start + size)), sampling, key, size, mesh)
        stored.append(json.dumps(texts))
        if processes.is_first():
            drafts.parent.mkdir(parents=True, exist_ok=True)
            workdir_lib.write_text(drafts, "".join(line + "\n" for line in stored))
        yield texts


def _reply(config: Experiment, folder: ModelFolder, asked: list[tuple[Request, str]], mesh: Mesh) -> list[str]:
    """Return the writer's greedy replies with the context, without their reasoning; "" for one that is cut at
    ``longest_reference`` tokens, reasoning included."""
    if not asked:
        return []
    task = config.task_config
    rows = [Row("", question, request.context, "") for request, question in asked]
    sampling = SamplingConfig(task.longest_reference, folder.stop_ids, folder.pad_id, 0.0)
    tokens = prompts_lib.encode(folder.tokenizer, rows, config.prompt)
    folder.check_prompts(tokens, task.longest_reference, "self_study.longest_reference")
    prompts, key = decoding.pad_prompts(tokens, folder.pad_id), rng.key_for(jax.random.key(task.seed), 0, "evaluation")
    texts = _decode(folder, prompts, sampling, key, config.eval.batch_size, mesh, "answering them")
    return [strip_reasoning(text)[0] for text in texts]


def _decode(
    folder: ModelFolder, prompts: Prompts, sampling: SamplingConfig, key, size: int, mesh: Mesh, what: str = ""
) -> list[str]:
    """Return the responses as text; "" for those that are cut."""
    rollout = decoding.decode(folder.params, folder.config, sampling, prompts, key, size, mesh, what=what)
    kept = [ids[mask] for ids, mask in zip(rollout.tokens_BxT, rollout.mask_BxT)]
    texts = responses.decode(folder.tokenizer, kept, folder.stop_ids)
    return [text if int(ids[-1]) in folder.stop_ids else "" for ids, text in zip(kept, texts)]
