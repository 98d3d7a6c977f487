"""All checks of a folder, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
from pathlib import Path

from ctxjax.audit import data, evaluations, steps
from ctxjax.audit.check import Check
from ctxjax.audit.folder import Folder
from ctxjax.audit.weights import Weights


def check_folder(path: Path, exports: Sequence[Path] = ()) -> Iterator[Check]:
    """Return the checks of the run, or of the evaluation, in the folder ``path``, made one by one.

    ``exports``: folders that were exported from the run. Raises ValueError if ``path`` is no such folder, or an export
    is none.
    """
    folder = Folder.open(path)
    for export in exports:
        if not folder.trains:
            raise ValueError(f"{path} is an evaluation's folder, and nothing is exported from it; leave {export} out")
        if not export.is_dir():
            raise ValueError(f"{export} is not a folder")
    return (Check.run(name, function) for name, function in _list_checks(folder, exports))


def _list_checks(folder: Folder, exports: Sequence[Path]):
    yield "folder", functools.partial(_check_folder, folder)
    yield "splits", functools.partial(data.check_splits, folder)
    if folder.trains:
        yield "teacher's samples", functools.partial(data.check_teacher_samples, folder)
    for arm in folder.arms:
        yield f"training rows of {arm}", functools.partial(data.check_training_rows, folder, arm)
        yield f"metrics of {arm}", functools.partial(steps.check_metrics, folder, arm)
    yield from evaluations.list_checks(folder)
    yield "results", functools.partial(evaluations.check_results, folder)
    if not folder.trains:
        return
    weights = Weights(folder)
    for arm in folder.arms:
        yield f"checkpoints of {arm}", functools.partial(weights.check_checkpoints, arm)
    yield "evaluated weights", weights.check_evaluated
    for export in exports:
        yield f"export {export.name}", functools.partial(weights.check_export, export)


def _check_folder(folder: Folder, check: Check) -> None:
    """The configuration is one, and the run has ended."""
    if folder.trains:
        check.expect("run.json: configuration", folder.config, folder.json("config.json"))
    kind = "run" if folder.trains else f"evaluation on {folder.run['split']}"
    check.seen.append(f"a {kind} of task {folder.config['task']}, seed {folder.config['seed']}")
    if not folder.is_finished:
        check.unchecked.append("what a run writes at its end; this one has not ended")
    if not folder.is_recorded:
        check.unchecked.append("what older versions of ctxjax did not write down")
