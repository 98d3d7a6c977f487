"""metrics.jsonl of an arm: every step once, every evaluation on dev once."""

from __future__ import annotations

from ctxjax.audit.check import SUMS, Check, list_numbers
from ctxjax.audit.folder import Folder
from ctxjax.data.task import METERS
from ctxjax.evaluation.metrics import METRICS

# Metrics that are sums over the model's outputs. Another mesh adds them in another order.
_SUMMED = {metric.key for metric in METRICS if {"comparison", "distill", *METERS} & {*metric.needs}}


def check_metrics(folder: Folder, arm: str, check: Check) -> None:
    """Steps are in order, complete and without repeats, and the first row is the base's evaluation on dev."""
    name, train, every = f"{arm}/metrics.jsonl", folder.config["train"], folder.config["eval"]["every"]
    if not folder.is_finished and not folder.has(name):
        check.unchecked.append(f"{name} was not written yet")
        return
    lines = folder.rows(name)
    on_dev = [line for line in lines if any(key.startswith("dev/") for key in line)]
    steps, evaluated = [line["step"] for line in lines if "loss" in line], [line["step"] for line in on_dev]
    last = train["steps"] if folder.is_finished else max(steps, default=0)
    due = {step for step in range(1, last + 1) if step % train["log_every"] == 0}
    due_on_dev = {step for step in range(last + 1) if not step or every and step % every == 0}
    if not folder.is_finished:
        due_on_dev -= {last} - set(evaluated)
    raised = {line["step"] for line in lines if any(key.startswith("alarm/") for key in line)}
    for what, found, expected in (("step", steps, due), ("evaluation on dev of step", evaluated, due_on_dev)):
        twice = {step for step in found if found.count(step) > 1} if len(set(found)) < len(found) else set()
        if twice:
            check.wrong.append(f"{name}: {what} {list_numbers(twice)} occurs more than once")
        elif found != sorted(found):
            check.wrong.append(f"{name}: the rows of {what}s are not in order")
        for problem, numbers in (("is missing", expected - set(found)), ("is not due", set(found) - expected - raised)):
            if numbers:
                check.wrong.append(f"{name}: {what} {list_numbers(numbers)} {problem}")
    if on_dev and folder.has("base/dev/evaluation.json"):
        base = folder.json("base/dev/evaluation.json")["metrics"]
        for key, value in base.items():
            if isinstance(value, float):  # a run that goes on with other devices evaluates its base again
                rounding = SUMS if key in _SUMMED else 1e-9
                where = f"{name}, step {on_dev[0]['step']}: dev/{key}"
                check.expect(where, on_dev[0].get(f"dev/{key}"), value, rounding)
    check.seen.append(f"steps {list_numbers(steps) or 'none'}; on dev {list_numbers(evaluated) or 'none'}; each once")
