"""Learn from experience (also ``python -m ctxjax.extract``)::

    ctxjax extract --config=configs/tiny_grid.py --workdir=runs/lessons

The model solves training questions or plays, without a context, and writes lessons from its own traces. Several
contexts made of such lessons are candidates; the best one on dev questions becomes ``experience.txt``, if it is better
than no context at all. It is the context of the next run, for example --config.tiny_grid.context_file=FILE. Questions,
decoding and model are those of a training run; config.extract has the rest. If the command is killed, give it again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
import sys

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags

from ctxjax.host import command, preemption, progress, workdir as workdir_lib

JOURNAL, EXPERIENCE = "candidates.jsonl", "experience.txt"
EMPTY_WINS = 5  # exit code if no candidate is better than the empty context


def main(config: ConfigDict, workdir: str | None, resume: str) -> int:
    """Run the command with the values of its flags (see ``command_line``); return 0 or EMPTY_WINS."""
    if workdir is None:
        raise ValueError("--workdir is missing; give a folder for the candidates and experience.txt")
    place = command.parse_folder("--workdir", workdir)
    if config is None:
        raise ValueError("--config is missing; for example --config=configs/tiny_grid.py")
    command.prepare(config)
    done = extract(config, place, resume)
    print(f"\n{describe(done)}\n")
    if done.chosen is None:
        print(f"the empty context wins: no {EXPERIENCE} is written. What was tried: {place / JOURNAL}")
        return EMPTY_WINS
    print(f"{done.chosen}\n\nthe context for the next run: {place / EXPERIENCE}; all that was tried: {place / JOURNAL}")
    return 0


def extract(config: ConfigDict, place: Path, resume: str = "auto", first: int = 0):
    """Extract and choose; write the journal and, if a context wins, ``experience.txt``. Return the Extraction.

    ``first``: the place of the first question to solve, in the order of the seed; those before it are left out.
    An extraction that was interrupted in the same folder goes on. Raises ValueError or OSError with the remedy.
    """
    with progress.Bar("importing the libraries"):
        from ctxjax import config as config_lib, sharding
        from ctxjax.data import splits
        from ctxjax.data.tasks import TASKS
        from ctxjax.experience import extraction, selection
        from ctxjax.experience.journal import Journal
        from ctxjax.games.boards import describe_players
        from ctxjax.host import processes
        from ctxjax.host.checksum import compute_digest, compute_fingerprint
        from ctxjax.inputs import run_inputs

    processes.check_alone("ctxjax extract")
    facts = workdir_lib.collect_facts(config)
    experiment = config_lib.experiment(config, jax.device_count(), trains=False)
    workdir_lib.check_workdir(place, facts["config"], resume)
    extraction.check_task(experiment)
    task_config = experiment.task_config
    if hasattr(task_config, "required"):
        task_config = dataclasses.replace(task_config, required=False)
    with progress.Bar("reading the questions"):
        task = TASKS[experiment.task][1](task_config)
        splits.check_splits(task, ("train", "dev"))
        selection.check_sizes(experiment.extract.candidates, len(task.rows("dev")), experiment.extract.budget)
        selection.check_level(len(task.rows("dev")), experiment.extract.level)
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    with workdir_lib.Lock(place) as lock, jax.set_mesh(mesh):
        path = run_inputs.prepare_student_path(experiment, task, mesh, {})
        folder = run_inputs.open_student(experiment, path, mesh, {})
        if boards := task.facts.get("boards", {}).get("dev"):
            print(f"dev boards: {describe_players(boards['ceiling'], boards['random'], boards['fixed'])}", flush=True)
        lock.take()
        with progress.Bar("computing the digests of weights and questions"):
            inputs = {"model": compute_fingerprint(folder.params), "stop_ids": list(folder.stop_ids), "first": first}
            inputs["rows"] = {split: compute_digest(task.rows(split)) for split in ("train", "dev")}
        workdir_lib.claim(place, facts, inputs)
        done = extraction.Extractor(experiment, task, folder, mesh, Journal(place / JOURNAL), first)()
        if done.chosen is not None:
            workdir_lib.write_text(place / EXPERIENCE, done.chosen + "\n")
        processes.wait("experience written")
    return done


def describe(done) -> str:
    """Return what an Extraction tried and how it chose, as lines of text."""
    counts, chosen = done.counts, done.selection
    lines = [
        f"{counts['responses']} responses, {counts['without a lesson']} without a lesson; "
        f"{len(done.candidates)} candidates ({counts['empty']} empty and {counts['near-duplicates']} near-duplicates "
        f"left out); {chosen.spent} answers asked for"
    ]
    for round in chosen.rounds:
        shown = ", ".join(
            f"{'empty' if number == 0 else number}: {100 * accuracy:.1f} %"
            for number, accuracy in zip(round.contestants, round.accuracy)
        )
        lines.append(f"after {round.asked} questions: {shown}")
    if chosen.p is None:
        lines.append(f"the best, {chosen.leader}, is no better than the empty context")
    else:
        lines.append(
            f"on {chosen.tested} further questions {chosen.leader} is {100 * chosen.gain:+.1f} points better than the "
            f"empty context, p = {chosen.p:.2g} (McNemar's exact test)"
        )
    return "\n".join(lines)


def command_line() -> None:
    """Read the flags and run the command. It ends with 0 if it wrote a context, with EMPTY_WINS if the empty context
    wins, and with 2 and one message after bad input."""
    preemption.listen(preemption.RUN_ENDS)
    config = config_flags.DEFINE_config_file("config", None, "The run's configuration, such as configs/tiny_grid.py.")
    workdir = flags.DEFINE_string("workdir", None, "Folder for candidates.jsonl and experience.txt.")
    resume = flags.DEFINE_enum("resume", "auto", workdir_lib.RESUME, "As for ctxjax train.")
    command.run(lambda _: sys.exit(main(config.value, workdir.value, resume.value)), config)


if __name__ == "__main__":
    command_line()
