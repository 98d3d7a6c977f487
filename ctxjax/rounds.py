"""Learn from experience again and again (also ``python -m ctxjax.rounds``)::

    ctxjax rounds --config=configs/tiny_grid.py --workdir=runs/rounds --rounds=2

A round lets the model write lessons from traces of its own (ctxjax.extract), and then trains it with the chosen lessons
as the context (ctxjax.main), one arm. The trained model is the student and the teacher of the next round, whose traces
are of training questions that no round before has seen, as long as there are any. A round in which the empty context
wins is the last one. If the command is killed, give it again: whatever is finished is not repeated.

Each round has a folder: ``extract`` and ``train``, the folders of these commands, and ``model``, the trained model.
"""

from __future__ import annotations

import json
from pathlib import Path
import shlex
import sys

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags

from ctxjax import extract as extract_lib
from ctxjax.host import command, preemption, progress, workdir as workdir_lib
from ctxjax.monitoring import run_end


def main(config: ConfigDict, workdir: str | None, rounds: int, arm: str | None) -> int:
    """Run the command with the values of its flags (see ``command_line``); return 0, or EMPTY_WINS of ctxjax.extract if
    a round ended without a context."""
    if workdir is None:
        raise ValueError("--workdir is missing; give a folder for the rounds")
    place = command.parse_folder("--workdir", workdir)
    if config is None:
        raise ValueError("--config is missing; for example --config=configs/tiny_grid.py")
    arm = arm or (config.run_arms or ("",))[-1]
    if arm not in config.arms:
        raise ValueError(f"--arm={arm} is not known; choose from {', '.join(config.arms)}")
    command.prepare(config)
    with progress.Bar("importing the libraries"):
        from ctxjax import config as config_lib, report
        from ctxjax.training.run import check_settings

    first = config_lib.experiment(make_round_config(config, place, 1, arm), jax.device_count())
    check_settings(first)
    if first.lora_init:
        raise ValueError(
            f"lora.init = {first.lora_init}: every round has a new base; merge the adapter into the model first"
        )
    facts = workdir_lib.collect_facts(config) | {"arm": arm}
    if (place / "config.json").exists():
        before = workdir_lib.read_config(place)["train"]["steps"]
        if before != config.train.steps:
            raise ValueError(
                f"train.steps = {config.train.steps}, and the rounds in {place} began with {before}; give that number, "
                "or choose another --workdir: all rounds are trained alike"
            )
    workdir_lib.check_workdir(place, facts["config"])
    results: dict[str, dict] = {}
    with workdir_lib.Lock(place) as lock:
        lock.take()
        workdir_lib.claim(place, facts, {"arm": arm})
        for number in range(1, rounds + 1):
            print(f"\nround {number} of {rounds}", flush=True)
            trained = run_round(config, place, number, arm)
            if trained is None:
                break
            results |= {"base": trained["base"]} if number == 1 else {}
            results[f"round {number}"] = trained[arm]
            workdir_lib.write_json(place / "results.json", results)
    if results:
        print(f"\n{report.results_table(results)}\n")
        print(f"after {len(results) - 1} of {rounds} rounds: {place / f'round{len(results) - 1}' / 'model'}")
    if len(results) - 1 < rounds:
        print("the empty context wins: no lesson is better than none, so this was the last round")
        return extract_lib.EMPTY_WINS
    return 0


def run_round(config: ConfigDict, place: Path, number: int, arm: str) -> dict[str, dict] | None:
    """Extract, train and export; what is finished is not repeated. Return the results of the training by arm, or None
    if the empty context wins."""
    from ctxjax import api, export

    folder = place / f"round{number}"
    config = make_round_config(config, place, number, arm)
    lessons, train, model = folder / "extract" / extract_lib.EXPERIENCE, folder / "train", folder / "model"
    if not model.exists():
        if not lessons.exists():
            first = (number - 1) * config.extract.candidates * config.extract.traces
            done = extract_lib.extract(config, folder / "extract", first=first)
            print(f"\n{extract_lib.describe(done)}\n", flush=True)
            if done.chosen is None:
                return None
        config[config.task].context_file = str(lessons)
        line = shlex.join(["python", "-m", "ctxjax.rounds", *sys.argv[1:]])
        api.start_run(config, train, "auto", command=line)
        export.export(train, model, arm)
    return json.loads((train / "results.json").read_text(encoding="utf-8"))


def make_round_config(config: ConfigDict, place: Path, number: int, arm: str) -> ConfigDict:
    """Return the configuration of a round: the model of the round before, one arm, and a seed of its own for sampling
    and for the order of questions. The seeds of worlds and of the base stay."""
    own = config.copy_and_resolve_references()
    own.seed, own.run_arms = config.seed + number - 1, (arm,)
    if number > 1:
        own.model.path = str(place / f"round{number - 1}" / "model")
    return own


def command_line() -> None:
    """Read the flags and run the command; exit codes are those of ctxjax.extract and ctxjax.main."""
    preemption.listen(preemption.RUN_ENDS)
    config = config_flags.DEFINE_config_file("config", None, "The run's configuration, such as configs/tiny_grid.py.")
    workdir = flags.DEFINE_string("workdir", None, "Folder with a folder for each round.")
    rounds = flags.DEFINE_integer("rounds", 2, "Rounds in all; a later call may ask for more.", lower_bound=1)
    arm = flags.DEFINE_string("arm", None, "The arm to train; default: the last one of config.run_arms.")
    with run_end.exit_readably():
        command.run(lambda _: sys.exit(main(config.value, workdir.value, rounds.value, arm.value)), config)


if __name__ == "__main__":
    command_line()
