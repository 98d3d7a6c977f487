"""Let a model learn from its own traces: solve or play, write lessons, and choose among the contexts made of them.

Every step's result is a line of a journal, so that an extraction that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng
from ctxjax.config_fields import require
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib, responses
from ctxjax.data.contexts import FROM_ROWS
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.reasoning import OPEN_REASONING
from ctxjax.data.task import LESSON, GameTask, Row, Task, longest_turns
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation.episodes import grade_turns
from ctxjax.evaluation.player import Player, Turn
from ctxjax.experience import items as items_lib, selection
from ctxjax.experience.journal import Journal
from ctxjax.host import progress
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import make_sampling_config

TRACES, LESSONS, ANSWERS = range(3)  # each has a key of its own
PROBE = f"{LESSON} one"  # a context, to see whether the chat template takes one
SOURCES = ("context", "context_file", "context_files", "context_column", *FROM_ROWS)


class Candidate(NamedTuple):
    """A context made of lessons: ``lines`` in their order, ``tokens`` in all. ``number``: of the traces that it is
    from."""

    number: int
    lines: list[str]
    tokens: int


class Extraction(NamedTuple):
    """``chosen``: the context to consolidate, or None if the empty one wins. ``candidates``: by their place, from 1.
    ``counts``: "responses", those "without a lesson", contexts that are "empty" or "near-duplicates"."""

    chosen: str | None
    candidates: list[Candidate]
    counts: dict[str, int]
    selection: selection.Selection


def check_task(config: Experiment) -> None:
    """Raise ValueError if the task has no extraction, or has a context already."""
    section, name = config.task_config, config.task
    if not hasattr(section, "context_file") or name == "self_study":
        raise ValueError(
            f"task = {name!r} has no extraction, since its contexts cannot be a file of lessons; choose from math, "
            "qa_jsonl, medical, safety, text_game, tiny_grid"
        )
    given = [f"{name}.{field}" for field in SOURCES if getattr(section, field, None)]
    if given:
        raise ValueError(f"{' and '.join(given)} is set, and an extraction makes the context itself; leave it out")
    for field, parts in (("solution", ("{question}", "{response}")), ("request", ("{trace}",))):
        text = getattr(config.extract, field)
        is_complete = all(part in text for part in parts)
        require(is_complete, f"extract.{field}", repr(text), f"a text with {' and '.join(parts)}")


class _OneTurn:
    """Questions as a game of one turn, for the Player. What is right is decided elsewhere."""

    max_turns = 1

    def play(self, row: Row, said: list[str]) -> Grade:
        return Grade(None, False)


class Extractor:
    """Extract and choose with ``folder``'s model. ``journal``: has the results of all steps that are done. ``first``:
    the place of the first question to solve, in the order of the seed."""

    def __init__(
        self, config: Experiment, task: Task, folder: ModelFolder, mesh: Mesh, journal: Journal, first: int = 0
    ):
        self._config, self._task, self._folder, self._journal, self._first = config, task, folder, journal, first
        self._batch, self._key = config.eval.batch_size, jax.random.key(config.extract.seed)
        # The model is asked in the same way with lessons and without. The teacher's own settings are for prompts with
        # a context only, so their effect would look like that of the lessons.
        self._prompt = dataclasses.replace(config.prompt, teacher_thinking=None, teacher_keywords=())
        self._reader = Player(_OneTurn(), folder, self._prompt, self._batch, mesh)
        self._player = self._reader
        if isinstance(task, GameTask):
            self._player = Player(task, folder, self._prompt, self._batch, mesh)
        self._rollout = make_sampling_config(config.rollout, folder)
        self._writing = dataclasses.replace(self._rollout, max_tokens=config.extract.max_tokens)
        self._judged = make_sampling_config(config.eval.decode, folder)

    def __call__(self) -> Extraction:
        """Raises ValueError if no response has a lesson, if the questions or the budget are too few, or if a question
        with the longest context is too long."""
        extract = self._config.extract
        train, dev = self._find_questions()
        candidates, counts = self._make_candidates(self._write_lessons(self._collect_traces(train)))
        if not candidates:
            raise ValueError(
                f"none of {counts['responses']} responses has a line with a lesson, one that begins with {LESSON!r}; "
                "change extract.request, raise extract.max_tokens, or take a larger model"
            )
        chosen = selection.select(
            len(candidates), len(dev), extract.budget, extract.level, self._make_score(dev, candidates)
        )
        self._journal.do("decision", lambda: chosen._asdict() | {"rounds": [r._asdict() for r in chosen.rounds]})
        text = None
        if chosen.winner != selection.EMPTY:
            text = items_lib.write_context(candidates[chosen.winner - 1].lines)
        return Extraction(text, candidates, counts, chosen)

    def _find_questions(self) -> tuple[list[Row], list[Row]]:
        """Return the questions to solve and those to choose with, without the ones that are too long (prompt.overlong).

        What would fail later is found here: a chat template that refuses a context, and prompts with lessons of
        extract.limit tokens.
        """
        extract = self._config.extract
        train = self._keep_fitting("train", None, 0, self._rollout.max_tokens)
        dev = self._keep_fitting("dev", PROBE, extract.limit, self._judged.max_tokens)
        selection.check_sizes(extract.candidates, len(dev), extract.budget)
        selection.check_level(len(dev), extract.level)
        return train, dev

    def _keep_fitting(self, split: str, context: str | None, lessons: int, most: int) -> list[Row]:
        """Return the rows that keep the limits with ``lessons`` more tokens of context than ``context`` has. ``most``:
        tokens of a response."""
        rows = [row._replace(context=None) for row in self._task.rows(split)]
        longest = longest_turns(self._task, rows)
        bare = full = self._encode(longest)
        if context is not None:
            full = self._encode([row._replace(context=context) for row in longest])
        views = {"bare": bare, "context": [ids[:1] * lessons + ids for ids in full]}
        try:
            kept = prompts_lib.keep_fitting_rows(rows, views, self._prompt)
            self._folder.check_prompts([views["context"][index] for index in kept], most)
        except ValueError as error:
            why = f"; extract.limit = {lessons} tokens of lessons are part of the prompt" if lessons else ""
            raise ValueError(f"{error}{why}") from None
        return [rows[index] for index in kept]

    def _encode(self, rows: list[Row]) -> list[list[int]]:
        return prompts_lib.encode(self._folder.tokenizer, rows, self._prompt)

    def _collect_traces(self, rows: list[Row]) -> list[str]:
        """Answer training questions, or play. Return the traces, those of a candidate in a row."""
        extract = self._config.extract
        order = np.random.default_rng([extract.seed, len(rows)]).permutation(len(rows))
        asked = [rows[order[(self._first + i) % len(rows)]] for i in range(extract.candidates * extract.traces)]
        traces = []
        for start, stop in self._chunks("solving or playing", len(asked)):
            own = asked[start:stop]

            def play(own=own, start=start) -> dict:
                played = self._play(self._player, self._rollout, own, TRACES, self._first + start)
                return {"traces": [{"id": row.id, "said": said} for row, (said, _) in zip(own, played)]}

            found = self._journal.do(f"traces {start}", play)["traces"]
            traces += [self._write_trace(row, trace["said"]) for row, trace in zip(own, found)]
        return traces

    def _write_trace(self, row: Row, said: list[str]) -> str:
        if isinstance(self._task, GameTask):
            return self._task.trace(row, said)
        return _fill(self._config.extract.solution, question=row.conversation, response=said[0])

    def _write_lessons(self, traces: list[str]) -> list[list[str]]:
        """Return the lessons that the model writes from each trace."""
        request, lessons = self._config.extract.request, []
        rows = [Row(f"trace {i}", _fill(request, trace=trace), None, "") for i, trace in enumerate(traces)]
        most = self._folder.config.max_positions - self._writing.max_tokens
        readable = [len(ids) <= most for ids in self._encode(rows)]
        if not all(readable):
            print(
                f"warning: {readable.count(False)} of {len(rows)} traces are left without a lesson: with their request "
                f"they have more than {most} tokens, and extract.max_tokens = {self._writing.max_tokens} more are over "
                "the model's positions; lower extract.max_tokens or rollout.max_tokens",
                flush=True,
            )
        for start, stop in self._chunks("writing lessons", len(rows)):
            own = rows[start:stop]

            def write(own=own, start=start) -> dict:
                asked = [row for row, can_read in zip(own, readable[start:]) if can_read]
                played = iter(self._play(self._reader, self._writing, asked, LESSONS, start))
                said = [next(played) if can_read else ([""], False) for can_read in readable[start : start + len(own)]]
                return {"responses": [{"text": texts[0], "cut": cut} for texts, cut in said]}

            found = self._journal.do(f"lessons {start}", write)["responses"]
            lessons += [items_lib.read_items(response["text"], response["cut"]) for response in found]
        return lessons

    def _make_candidates(self, lessons: list[list[str]]) -> tuple[list[Candidate], dict[str, int]]:
        """Append each candidate's lessons, and leave out contexts that are empty or near-duplicates."""
        extract = self._config.extract
        contexts = []
        for first in range(0, len(lessons), extract.traces):
            lines: list[str] = []
            for new in lessons[first : first + extract.traces]:
                lines = items_lib.append(lines, new, extract.limit, self._count_tokens)
            contexts.append(lines)
        texts = {number: items_lib.write_context(lines) for number, lines in enumerate(contexts, 1) if lines}
        kept = items_lib.remove_near_duplicates(texts.values())
        numbers = [next(number for number, text in texts.items() if text == own) for own in kept]
        candidates = [Candidate(n, contexts[n - 1], self._count_tokens(texts[n])) for n in numbers]
        counts = {
            "responses": len(lessons),
            "without a lesson": sum(not own for own in lessons),
            "empty": len(contexts) - len(texts),
            "near-duplicates": len(texts) - len(kept),
        }
        made = {"candidates": [candidate._asdict() for candidate in candidates], "counts": counts}
        self._journal.do("candidates", lambda: made)
        return candidates, counts

    def _count_tokens(self, text: str) -> int:
        return len(self._folder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _make_score(self, dev: list[Row], candidates: list[Candidate]) -> selection.Score:
        contexts = [None, *(items_lib.write_context(candidate.lines) for candidate in candidates)]
        rounds, asked_before = itertools.count(1), 0

        def score(pairs: list[tuple[int, int]]) -> np.ndarray:
            nonlocal asked_before
            number, right, first = next(rounds), "", asked_before
            asked_before += len(pairs)
            rows = [dev[question]._replace(context=contexts[candidate]) for candidate, question in pairs]
            for start, stop in self._chunks(f"choosing a context, round {number}", len(rows)):

                def answer(start=start, stop=stop) -> dict:
                    own = rows[start:stop]
                    played = self._play(self._player, self._judged, own, ANSWERS, first + start)
                    graded = [grade_turns(self._task, said, row).correct for row, (said, _) in zip(own, played)]
                    return {"asked": pairs[start:stop], "right": "".join("01"[correct] for correct in graded)}

                right += self._journal.do(f"answers {number}, {start}", answer)["right"]
            return np.array([mark == "1" for mark in right])

        return score

    def _chunks(self, what: str, count: int) -> Iterator[tuple[int, int]]:
        """Yield the ends of batches, with a bar that counts what they hold."""
        with progress.Bar(what, count, "answer", compiles=True) as bar:
            for start in range(0, count, self._batch):
                stop = min(start + self._batch, count)
                yield start, stop
                bar.update(stop - start)

    def _play(
        self, player: Player, sampling: SamplingConfig, rows: list[Row], phase: int, first: int
    ) -> list[tuple[list[str], bool]]:
        """Return, of every row, the texts of its turns, and whether one of them was cut."""
        if not rows:
            return []
        longest = rows if phase == LESSONS else longest_turns(self._task, rows)
        field = "extract.max_tokens" if phase == LESSONS else "rollout.max_tokens"
        self._folder.check_prompts(self._encode(longest), sampling.max_tokens, field)
        played = player.play(self._folder.params, sampling, rows, rng.key_for(self._key, phase, "experience"), first)
        return [self._read_turns(turns) for turns in played]

    def _read_turns(self, turns: list[Turn]) -> tuple[list[str], bool]:
        stop_ids = self._folder.stop_ids
        texts = responses.decode(self._folder.tokenizer, (turn.tokens for turn in turns), stop_ids)
        said = [OPEN_REASONING * turn.opened + text for turn, text in zip(turns, texts)]
        return said, any(int(turn.tokens[-1]) not in stop_ids for turn in turns)


def _fill(template: str, **values: str) -> str:
    """Replace every {name} of ``values`` in the template; nothing in the values themselves."""
    return re.sub(r"{(\w+)}", lambda found: values.get(found[1], found[0]), template)
