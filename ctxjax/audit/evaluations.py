"""The evaluations of a folder: which questions, views and decoding, the grades, and every number of results.json."""

from __future__ import annotations

import functools

from ctxjax.audit import numbers
from ctxjax.audit.check import SUMS, Check
from ctxjax.audit.folder import Evaluated, Folder
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.digests import digest_context, digest_question, digest_tokens
from ctxjax.data.task import GameTask, grade_response, read_row
from ctxjax.evaluation.episodes import TURN_BREAK, grade_turns
from ctxjax.evaluation.select import parse_select
from ctxjax.host.checksum import compute_digest
from ctxjax.training.checkpoint import best_step, saved_steps

GRADE = ("parsed", "correct", "reason", "lenient")


def check_items(folder: Folder, one: Evaluated, check: Check) -> None:
    """Every question of the split once in every view, under the view's context, in the view's prompt."""
    name = f"{one.folder}/items.jsonl"
    items, by_view = folder.rows(name), _group(folder.rows(name))
    stored = _read_stored(folder, one, check)
    if stored is not None and "items" in stored:
        check.expect(f"{name}: digest", compute_digest(folder.text(name)), stored["items"])
    asked = [(item["id"], item["sample"]) for item in by_view.get("bare", [])]
    if not asked:
        check.wrong.append(f"{name} has no responses in the view bare")
    for view, own in by_view.items():
        found = [(item["id"], item["sample"]) for item in own]
        check.expect(f"{name}: (question, sample) in the view {view}", found, asked)
    samples = folder.config["eval"]["samples"]
    ids = list(dict.fromkeys(identifier for identifier, _ in asked))
    check.expect(f"{name}: (question, sample)", asked, [(i, sample) for i in ids for sample in range(samples)])
    check.seen.append(f"{len(ids)} questions of {one.split} in the views {', '.join(by_view)}")
    if "record" not in folder.run:
        check.unchecked.append("older versions did not write down the splits and contexts")
    else:
        _check_asked(folder, one, ids, check)
        _check_views(folder, one, items, check)
    _check_prompts(folder, name, items, check)


def _check_asked(folder: Folder, one: Evaluated, ids: list[str], check: Check) -> None:
    """No question of the split was left out, except those that are too long for every model of the run."""
    rows, _ = folder.data
    expected = [row["id"] for row in rows if row["split"] == one.split]
    if folder.config["prompt"]["overlong"] != "error":
        if not folder.trains or one.name in ("base", "teacher"):
            check.unchecked.append("whether all other questions are too long (prompt.overlong is not error)")
            return
        expected = list(dict.fromkeys(item["id"] for item in folder.rows("base/items.jsonl")))
    check.expect(f"{one.folder}/items.jsonl: questions of {one.split}", ids, expected)


def _group(items: list[dict]) -> dict[str, list[dict]]:
    by_view: dict[str, list[dict]] = {}
    for item in items:
        by_view.setdefault(item["view"], []).append(item)
    return by_view


def _read_stored(folder: Folder, one: Evaluated, check: Check) -> dict | None:
    """Return evaluation.json; None if an older version wrote none."""
    name = f"{one.folder}/evaluation.json"
    if not folder.trains and not folder.has(name) and not folder.is_recorded:
        return None
    stored = folder.json(name)
    check.expect(f"{name}: step", stored["of"]["step"], one.step)
    return stored


def _check_views(folder: Folder, one: Evaluated, items: list[dict], check: Check) -> None:
    rows, contexts = folder.data
    own = {row["id"]: row for row in rows if row["split"] == one.split}
    held_out = {other["context"] for other in contexts if other["other_context_of"] == one.split}
    for number, item in enumerate(items, start=1):
        where = f"{one.folder}/items.jsonl, line {number}, row {item['id']!r} in the view {item['view']}"
        row, context = own.get(item["id"]), item["context"]
        if row is None:
            check.wrong.append(f"{where}: this is no {one.split} row")
            continue
        if item["view"] != "other":  # under another context a row may ask another question: check_grades
            asked = digest_question(read_row(item).conversation)
            check.expect(f"{where}: digest of the question", asked, row["question"])
        digest = None if context is None else digest_context(context)
        if item["view"] in ("bare", "context"):
            expected = None if item["view"] == "bare" else row["context"]
            check.expect(f"{where}: digest of the context", digest, expected)
        elif item["view"] == "empty":
            check.expect(f"{where}: context", context, "")
        elif item["view"] == "other" and digest not in held_out:
            check.wrong.append(f"{where}: its context {context!r} is none of those held out for {one.split}")
        elif item["view"] in ("paraphrase", "unrelated") and not context:
            check.wrong.append(f"{where} has no context")
    check.seen.append("contexts as the views say")


def _check_prompts(folder: Folder, name: str, items: list[dict], check: Check) -> None:
    """The tokens that were decoded are those of the question and the context."""
    if not all("prompt" in item for item in items):
        check.unchecked.append(f"the prompts, which {name} does not have")
        return
    if folder.opened.tokenizer is None:
        check.unchecked += folder.opened.reasons
        return
    encoded = prompts_lib.encode(folder.opened.tokenizer, list(map(read_row, items)), folder.experiment.prompt)
    for number, (item, ids) in enumerate(zip(items, encoded), start=1):
        where = f"{name}, line {number}, row {item['id']!r} in the view {item['view']}: digest of the prompt's tokens"
        check.expect(where, item["prompt"], digest_tokens(ids))
    check.seen.append("the prompts' tokens are those of the views")


def check_decoding(folder: Folder, one: Evaluated, check: Check) -> None:
    """Views are decoded as configured, greedily by default."""
    stored = _read_stored(folder, one, check)
    if not stored or not stored.get("decoding"):
        if folder.is_recorded:
            check.wrong.append(f"{one.folder}/evaluation.json does not say how the views were decoded")
        else:
            check.unchecked.append("an older version did not write it down")
        return
    missing = _group(folder.rows(f"{one.folder}/items.jsonl")).keys() - stored["decoding"].keys()
    if missing:
        check.wrong.append(f"{one.folder}/evaluation.json does not say how {', '.join(sorted(missing))} was decoded")
    config = folder.config
    common = {"max_tokens": config["rollout"]["max_tokens"], "seed": config["seed"]}
    for view, decoding in stored["decoding"].items():
        section = config["rollout" if view == "distill" else "eval"]
        samples = 1 if view == "distill" else section["samples"]
        expected = common | {name: section[name] for name in ("temperature", "top_k", "top_p")} | {"samples": samples}
        check.expect(f"{one.folder}/evaluation.json: decoding of the view {view}", decoding, expected)
    temperature = config["eval"]["temperature"]
    check.seen.append(
        f"all views at temperature {temperature:g}, as configured" if temperature else "all views greedily"
    )


def check_grades(folder: Folder, one: Evaluated, check: Check) -> None:
    """The task's grader says of each stored response what its item says; references are the task's."""
    task = folder.opened.task
    if task is None:
        check.unchecked += folder.opened.reasons
        return
    name, rows = f"{one.folder}/items.jsonl", {row.id: row for row in task.rows(one.split)}
    items = folder.rows(name)
    for number, item in enumerate(items, start=1):
        where = f"{name}, line {number}, row {item['id']!r} in the view {item['view']}"
        row = rows.get(item["id"])
        if row is None:
            check.wrong.append(f"{where}: the task has no such {one.split} row")
            continue
        context = item["context"]
        asked = task.rows_under(row, context) if item["view"] == "other" else [row._replace(context=context)]
        row = next((one for one in asked if one.question == item["question"]), None)
        if row is None:
            check.wrong.append(f"{where}: its question is none that may be asked there")
            continue
        check.expect(f"{where}: reference", item["reference"], str(row.check or row.reference))
        if "group" in item:  # older runs have none
            check.expect(f"{where}: group", item["group"], task.group(row) or row.id)
        said = item["text"].split(TURN_BREAK) if isinstance(task, GameTask) else [item["text"]]
        if len(said) != item.get("turns", 1):
            check.unchecked.append(f"{where}: its turns cannot be told apart, since a response has an empty line")
            continue
        grade = grade_turns(task, said, row)._asdict()
        check.expect(f"{where}: grade", {key: item[key] for key in GRADE}, {key: grade[key] for key in GRADE})
    check.seen.append(f"{len(items)} responses graded again")


def check_numbers(folder: Folder, one: Evaluated, check: Check) -> None:
    """Every number of the evaluation is that of its responses, and results.json has the same."""
    stored = _read_stored(folder, one, check)
    items = folder.rows(f"{one.folder}/items.jsonl")
    resamples = folder.config["eval"]["bootstrap"]
    ignored = None
    if stored and "obedience_floor" in stored["metrics"]:
        ignored = _grade_ignored(folder, one, items)
        if ignored is None:
            check.unchecked.append("the floor of obedience, since the task or its rows are not here")
    expected = numbers.recompute(items, _grade_defaults(folder, one, items), resamples, ignored)
    sources = [] if stored is None else [(f"{one.folder}/evaluation.json", stored["metrics"])]
    if one.results is not None:
        sources.append((f"results.json, {one.label}", one.results))
    for where, found in sources:
        for key, value in expected.items():
            check.expect(f"{where}: {key}", found.get(key), value)
        _check_view_kl(check, where, found, items)
    check.seen.append(f"{len(expected)} numbers recomputed from {len(items)} responses, intervals by the library")
    if stored is None or one.results is None:
        return
    kept = {key: value for key, value in stored["metrics"].items() if key not in expected}
    for key, value in kept.items():
        check.expect(f"results.json, {one.label}: {key}", one.results.get(key), value, 0.0)
    check.seen.append(f"{len(kept)} that need the model ({', '.join(list(kept)[:2])}, ...) equal evaluation.json's")


def _grade_defaults(folder: Folder, one: Evaluated, items: list[dict]) -> list[bool] | None:
    task = folder.opened.task
    rows = {} if task is None else {row.id: row for row in task.rows(one.split)}
    bare = [(rows.get(item["id"]), item["text"]) for item in items if item["view"] == "bare"]
    if any(row is None or row.default is None for row, _ in bare):
        return None
    return [task.grade(text, row.default).correct for row, text in bare]


def _grade_ignored(folder: Folder, one: Evaluated, items: list[dict]) -> list[bool] | None:
    """Whether each bare response is right under the other context that its question was asked under."""
    task = folder.opened.task
    rows = {} if task is None else {row.id: row for row in task.rows(one.split)}
    pairs = zip(*([item for item in items if item["view"] == view] for view in ("bare", "other")), strict=True)
    graded = []
    for bare, other in pairs:
        if bare["id"] not in rows:
            return None
        asked = task.rows_under(rows[bare["id"]], other["context"])
        row = next((row for row in asked if row.question == bare["question"]), None)
        if row is None:
            return None
        graded.append(grade_response(task, bare["text"], row).correct)
    return graded


def _check_view_kl(check: Check, where: str, found: dict, items: list[dict]) -> None:
    """The view KL is the mean of that by position, weighted with the responses that reach it."""
    if "view_kl" not in found:
        return
    first = [item for item in items if item["view"] == "bare" and item["sample"] == 0]
    if any(item.get("turns", 1) > 1 for item in first):
        check.unchecked.append(f"{where}: the view KL by position, since items have the length of all turns together")
        return
    lengths = [item["length"] for item in first]
    by_position = found["view_kl_by_position"]
    reached = [sum(length > place for length in lengths) for place in range(len(by_position))]
    check.expect(f"{where}: positions with a view KL", [v is not None for v in by_position], [n > 0 for n in reached])
    total = sum(value * count for value, count in zip(by_position, reached) if value is not None)
    check.expect(f"{where}: view_kl", found["view_kl"], total / max(sum(reached), 1), SUMS)


def check_results(folder: Folder, check: Check) -> None:
    """What results.json says of arms beyond their evaluations: steps, differences, alarms, selected checkpoints."""
    if not folder.is_finished:
        check.unchecked.append("results.json is written at the end of a run, and this one has not ended")
        return
    results = folder.json("results.json")
    if not folder.trains:
        check.seen.append(f"has {', '.join(results)}")
        return
    models = [name for name in ("base", "teacher") if name == "base" or "teacher" in folder.run.get("inputs", {})]
    check.expect("results.json: models", list(results), models + folder.arms)
    first, *others = folder.arms
    for arm in folder.arms:
        row, where = results[arm], f"results.json, {arm}"
        check.expect(f"{where}: step", row["step"], folder.config["train"]["steps"])
        metrics = folder.rows(f"{arm}/metrics.jsonl")
        _check_alarms(check, where, row, metrics)
        _check_selected(folder, check, where, arm, row, metrics)
        _check_learning(folder, check, where, row, metrics)
        if arm in others:
            pair = (folder.rows(f"{name}/items.jsonl") for name in (arm, first))
            check.expect(f"{where}: harm_minus_{first}", row[f"harm_minus_{first}"], numbers.harm_difference(*pair))
    check.seen.append(f"steps, alarms, selected checkpoints and differences of {', '.join(folder.arms)}")


def _check_alarms(check: Check, where: str, row: dict, metrics: list[dict]) -> None:
    held: dict[str, list[int]] = {}
    for line in metrics:
        for key in line:
            if key.startswith("alarm/"):
                held.setdefault(key.removeprefix("alarm/"), []).append(line["step"])
    found = {name: {key: alarm[key] for key in ("step", "rows")} for name, alarm in row.get("alarms", {}).items()}
    check.expect(f"{where}: alarms", found, {name: {"step": s[0], "rows": len(s)} for name, s in held.items()})
    if "skipped_steps" in row:
        skipped = sum(int(line.get("skipped", 0)) for line in metrics)
        check.expect(f"{where}: skipped_steps", row["skipped_steps"], skipped)


def _check_selected(folder: Folder, check: Check, where: str, arm: str, row: dict, metrics: list[dict]) -> None:
    """The selected checkpoint is the best one on dev of those that are kept."""
    saved = saved_steps(folder.path / arm / "checkpoints")
    if not saved:
        check.unchecked.append(f"the selected checkpoint of {arm}, whose checkpoints are not here")
        return
    key, sign = parse_select(folder.config["eval"]["select"])
    scores = {
        line["step"]: sign * line.get(f"dev/{key}", float("nan"))
        for line in metrics
        if line["step"] in saved and any(name.startswith("dev/") for name in line)
    }
    best = best_step(scores)
    expected = None if best in (None, row["step"]) else best
    check.expect(f"{where}: step of the selected checkpoint", row.get("selected", {}).get("step"), expected)


def _check_learning(folder: Folder, check: Check, where: str, row: dict, metrics: list[dict]) -> None:
    """The lowest accuracy with the context while the arm was trained, if it was evaluated."""
    if "lowest_acc_xc" not in row and not folder.is_recorded:
        check.unchecked.append(f"{where}: lowest_acc_xc, which older versions did not write down")
        return
    found = [line["dev/acc_xc"] for line in metrics if line["step"] and "dev/acc_xc" in line]
    lowest, lost = None, None
    if found:
        lowest = min(found)
        lost = max(folder.json("base/dev/evaluation.json")["metrics"]["acc_xc"] - lowest, 0.0)
    check.expect(f"{where}: lowest_acc_xc", row.get("lowest_acc_xc"), lowest)
    check.expect(f"{where}: context_loss", row.get("context_loss"), lost)


def list_checks(folder: Folder):
    """Yield (name, function) of the checks of every evaluation."""
    kinds = {"items": check_items, "decoding": check_decoding, "grades": check_grades, "numbers": check_numbers}
    for one in folder.evaluations:
        for kind, function in kinds.items():
            yield f"{kind} of {one.label}", functools.partial(function, folder, one)
