"""Which rows were trained on: the splits, the rows of every step, the questions of the teacher's samples."""

from __future__ import annotations

from collections import Counter
import functools

import jax
import numpy as np

from ctxjax.audit.check import Check, list_numbers
from ctxjax.audit.folder import Folder
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.digests import digest_question, digest_tokens
from ctxjax.data.pipeline import draw_other, shuffle_questions
from ctxjax.data.splits import SPLITS
from ctxjax.data.task import read_row
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.train_step import off_policy_steps
from ctxjax.host.checksum import compute_digest
from ctxjax.inputs.data_record import FILE as DATA_FILE, ROWS_FILE, DataRecord
from ctxjax.inputs.teacher_samples import FILE as SAMPLES_FILE

REDRAWS = 20  # a retention pair that does not fit is drawn again, so a row's pair is one of its first draws


def check_splits(folder: Folder, check: Check) -> None:
    """No question in two splits, no other context in two splits or trained into the weights."""
    if "record" not in folder.run:
        check.unchecked.append(f"the version of ctxjax that made this folder wrote no {DATA_FILE}")
        return
    check.expect(f"{DATA_FILE}: digest", compute_digest(folder.text(DATA_FILE)), folder.run["record"][DATA_FILE])
    rows, contexts = folder.data
    _find_repeats(check, "id", [(row["id"], number, row["split"]) for number, row in enumerate(rows)])
    _find_repeats(
        check, "question", [(row["question"], row["split"], f"{row['split']}: {row['id']!r}") for row in rows]
    )
    pools = [(one["context"], one["other_context_of"], f"the pool of {one['other_context_of']}") for one in contexts]
    own = [(row["context"], "internalized", "the contexts to internalize") for row in rows if row["context"]]
    _find_repeats(check, "context", pools + own)
    sizes = Counter(row["split"] for row in rows)
    held_out = Counter(one["other_context_of"] for one in contexts)
    check.seen.append(
        ", ".join(f"{sizes[split]} {split}" for split in SPLITS) + " rows, no question in two splits; other contexts: "
        f"{held_out['train']} to train on, {held_out['dev'] + held_out['test']} held out, none in two splits"
    )
    task = folder.opened.task
    if task is None:
        check.unchecked += folder.opened.reasons
        return
    now = DataRecord(task)
    for kind, found, expected in (("row", rows, now.rows), ("other context", contexts, now.contexts)):
        check.expect(f"{DATA_FILE}: number of {kind}s", len(found), len(expected))
        for number, (line, other) in enumerate(zip(found, expected)):
            check.expect(f"{DATA_FILE}, {kind} {number}", {key: line.get(key) for key in other}, other)
    check.seen.append("as the task makes them")


def _find_repeats(check: Check, what: str, keys: list[tuple]) -> None:
    """``keys``: (key, group, name). No key may occur in two groups."""
    seen: dict[str, tuple] = {}
    for key, group, name in keys:
        first, first_name = seen.setdefault(key, (group, name))
        if first != group:
            check.wrong.append(f"{DATA_FILE}: the {what} {key} is in two places, {first_name} and {name}")


def check_training_rows(folder: Folder, arm: str, check: Check) -> None:
    """Every step was given training rows, in the order of (seed, step), and retention pairs of training contexts."""
    name = f"{arm}/{ROWS_FILE}"
    if "record" not in folder.run or not folder.has(name) and not (folder.is_finished and folder.is_recorded):
        check.unchecked.append(f"{name} was not written")
        return
    lines, train = folder.rows(name), folder.config["train"]
    numbers = [line["step"] for line in lines]
    last = train["steps"] if folder.is_finished else max(numbers, default=0)
    _check_steps(check, name, numbers, range(1, last + 1), folder.is_recorded)
    rows, contexts = folder.data
    expected = _Expected(folder, arm)
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}, step {line['step']}"
        for view in ("bare", "context"):
            outside = [_name_row(rows, row) for row in line[view] if not _is_trained(rows, row)]
            if outside:
                check.wrong.append(f"{where}: the {view} prompts are of {', '.join(outside)}, not of training rows")
            check.expect(f"{where}: rows in the view {view}", line[view], expected.rows(line["step"]))
        _check_pairs(check, where, line, expected, rows, contexts)
        digest = expected.digest(line)
        if digest is not None:
            check.expect(f"{where}: digest of the tokens", line["tokens"], digest)
    check.seen.append(f"steps {list_numbers(numbers) or 'none'}: rows of train only, in the order of (seed, step)")
    if expected.pairs_per_step:
        check.seen.append(f"{expected.pairs_per_step} retention rows a step, under contexts to train on")
    if expected.has_tokens:
        check.seen.append("the tokens are those of these rows")
    check.unchecked += folder.opened.reasons


def _check_steps(check: Check, name: str, numbers: list[int], expected: range, is_recorded: bool) -> None:
    counts = Counter(numbers)
    twice, missing = [n for n in counts if counts[n] > 1], set(expected) - counts.keys()
    if twice:
        check.wrong.append(f"{name}: step {list_numbers(twice)} occurs more than once")
    if counts.keys() - set(expected):
        check.wrong.append(f"{name}: step {list_numbers(counts.keys() - set(expected))} is beyond the run's steps")
    if missing and is_recorded:
        check.wrong.append(f"{name}: step {list_numbers(missing)} is missing")
    elif missing:
        check.unchecked.append(f"steps {list_numbers(missing)}, which an older version took")
    if not twice and numbers != sorted(numbers):
        check.wrong.append(f"{name}: the steps are not in order")


def _check_pairs(check: Check, where: str, line: dict, expected: _Expected, rows: list, contexts: list) -> None:
    pairs = line.get("other", [])
    check.expect(f"{where}: number of retention rows", len(pairs), expected.pairs_per_step)
    for place, (row, context, question) in enumerate(pairs):
        which = f"{where}, retention row {place}"
        if not _is_trained(rows, row):
            check.wrong.append(f"{which} asks {_name_row(rows, row)}, not a training row")
        one = contexts[context] if context is not None and 0 <= context < len(contexts) else None
        if one is None or one["other_context_of"] != "train" or one.get("left_out"):
            of = "no other context of the task" if one is None else f"one of {one['other_context_of']}"
            held = ", which is held out" if one and one["other_context_of"] != "train" else ""
            check.wrong.append(f"{which} has the context {context}: {of}{held}")
        elif not expected.is_draw(line["step"], place, [row, context, question]):
            check.wrong.append(f"{which} is {[row, context, question]}, which (seed, step) does not draw")


def _is_trained(rows: list[dict], row: int | None) -> bool:
    in_range = row is not None and 0 <= row < len(rows)
    return in_range and rows[row]["split"] == "train" and not rows[row].get("left_out")


def _name_row(rows: list[dict], row: int | None) -> str:
    if row is None or not 0 <= row < len(rows):
        return f"no row of {DATA_FILE} ({row})"
    return f"row {rows[row]['id']!r} of {rows[row]['split']}"


class _Expected:
    """What an arm's steps should have been given. Order and draws use the library's shuffle and numpy's generator."""

    def __init__(self, folder: Folder, arm: str):
        self._folder, config = folder, folder.config
        self._seed, self._batch = config["seed"], config["train"]["batch_size"]
        rows, contexts = folder.data
        self._kept = [n for n, row in enumerate(rows) if row["split"] == "train" and not row.get("left_out")]
        self._contexts = [
            n for n, one in enumerate(contexts) if one["other_context_of"] == "train" and not one.get("left_out")
        ]
        self._order = shuffle_questions(len(self._kept), self._seed) if self._kept else []
        retains = (config["loss"] | config["arms"][arm])["mu"] > 0
        self.pairs_per_step = (config["train"]["retention_rows"] or self._batch) if retains else 0
        self.has_tokens = folder.opened.tokenizer is not None

    def rows(self, step: int) -> list[int]:
        first = (step - 1) * self._batch
        return [self._kept[self._order[n]] for n in range(first, first + self._batch)]

    def is_draw(self, step: int, place: int, found: list[int]) -> bool:
        rng = np.random.default_rng([self._seed, (step - 1) * self._batch + place])
        for _ in range(REDRAWS):
            row, context, question = draw_other(rng, len(self._kept), len(self._contexts))
            if [self._kept[row], self._contexts[context], question] == found:
                return True
        return False

    def digest(self, line: dict) -> str | None:
        """Return the digest of the prompts of a line's rows; None if they cannot be made here."""
        if not self.has_tokens or None in line["bare"] + line["context"]:
            return None
        views = [[self._digests[view][row] for row in line[view]] for view in ("bare", "context")]
        task, tokenizer, _ = self._folder.opened
        if "other" in line:
            others = [text for split in SPLITS for text in task.other_contexts(split)]
            asked = [(task.rows_under(self._train[row], others[context]), n) for row, context, n in line["other"]]
            views.append(self._encode([rows[number % len(rows)] for rows, number in asked]))
        return compute_digest(views)

    @functools.cached_property
    def _train(self):
        return self._folder.opened.task.rows("train")

    @functools.cached_property
    def _digests(self) -> dict[str, list[str]]:
        bare = [row._replace(context=None) for row in self._train]
        return {"bare": self._encode(bare), "context": self._encode(self._train)}

    def _encode(self, rows) -> list[str]:
        tokenizer, config = self._folder.opened.tokenizer, self._folder.experiment.prompt
        return [digest_tokens(ids) for ids in prompts_lib.encode(tokenizer, rows, config)]


def _find_off_policy_steps(config: dict, arm: str) -> set[int]:
    """Return the steps of an arm, from 1, that learn from the teacher's samples."""
    loss = config["loss"] | config["arms"][arm]
    draw = LossConfig(on_policy_fraction=loss["on_policy_fraction"], off_policy_steps=loss["off_policy_steps"])
    given = off_policy_steps(draw, jax.random.key(config["seed"]), config["train"]["steps"])
    return {int(step) + 1 for step in np.flatnonzero(given)}


def check_teacher_samples(folder: Folder, check: Check) -> None:
    """The teacher answered the questions of the steps that learn from its answers, and these are training rows."""
    config = folder.config
    wanted = {arm: _find_off_policy_steps(config, arm) for arm in folder.arms}
    learners = ", ".join(arm for arm, steps in wanted.items() if steps)
    if not folder.has(SAMPLES_FILE):
        if learners and folder.is_finished:
            check.wrong.append(f"{SAMPLES_FILE} is missing, and {learners} learns from it")
        return
    lines = folder.rows(SAMPLES_FILE)
    by_step: dict[int, list[dict]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    missing = set().union(*wanted.values()) - by_step.keys()
    further = by_step.keys() - set().union(*(_find_off_policy_steps(config, arm) for arm in folder.arms_of_all_starts))
    if folder.is_finished and missing:
        check.wrong.append(f"{SAMPLES_FILE}: step {list_numbers(missing)} is missing, and {learners} learns from it")
    if further:
        check.wrong.append(f"{SAMPLES_FILE}: no arm learns from the teacher at step {list_numbers(further)}")
    for step, own in by_step.items():
        check.expect(f"{SAMPLES_FILE}, step {step}: responses", len(own), config["train"]["batch_size"])
    check.seen.append(f"{len(lines)} responses for {len(by_step)} steps")
    if "record" not in folder.run:
        check.unchecked.append("their questions: older versions did not write down the training rows")
        return
    rows, _ = folder.data
    numbers = {row["id"]: number for number, row in enumerate(rows)}
    for number, line in enumerate(lines, start=1):
        where, row = f"{SAMPLES_FILE}, line {number}", numbers.get(line["id"])
        if not _is_trained(rows, row):
            check.wrong.append(f"{where}: {line['id']!r} is no training row")
        else:
            asked = digest_question(read_row(line).conversation)
            check.expect(f"{where}: digest of the question", asked, rows[row]["question"])
    for arm in folder.arms:
        name = f"{arm}/{ROWS_FILE}"
        for line in folder.rows(name) if folder.has(name) else []:
            if line["step"] in by_step:
                found = [numbers.get(sample["id"]) for sample in by_step[line["step"]]]
                check.expect(f"{SAMPLES_FILE}, step {line['step']}: rows that {arm} was given", found, line["bare"])
    check.seen.append("the questions are those of these steps")
