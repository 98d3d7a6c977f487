"""Read the folder of a run or of an evaluation, and what is at hand of its data and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ctxjax import config as config_lib
from ctxjax.config_sections import Experiment
from ctxjax.data.splits import SPLITS
from ctxjax.data.task import Task
from ctxjax.data.tasks import TASKS
from ctxjax.host import workdir as workdir_lib
from ctxjax.host.checksum import compute_digest
from ctxjax.host.hub import find_folder
from ctxjax.inputs.data_record import FILE as DATA_FILE
from ctxjax.inputs.model_folder import load_tokenizer


class Opened(NamedTuple):
    """``task`` and ``tokenizer`` of the run; None, and the reason why, if they are not at hand as the run read them."""

    task: Task | None
    tokenizer: Any
    reasons: list[str]


class Evaluated(NamedTuple):
    """One stored evaluation. ``name``: of the model in results.json. ``step``: after which it was made."""

    name: str
    folder: str
    split: str
    step: int
    results: dict | None

    @property
    def label(self) -> str:
        return self.folder.replace("/", ", ")


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A folder whose run.json could be read. ``trains``: whether it is a run's, and not an evaluation's."""

    path: Path
    trains: bool
    run: dict

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Raises ValueError if the folder is neither a run's nor an evaluation's."""
        trains = (path / "config.json").is_file()
        if not (path / "run.json").is_file():
            missing = "run.json" if trains else "config.json and no run.json"
            raise ValueError(f"{path} is not the folder of a run or of an evaluation: it has no {missing}")
        run = _read_json(path, "run.json")
        config = run.get("config") if isinstance(run, dict) else None
        sections = {"run_arms", "arms", "loss", "train", "eval", "rollout"}
        if not isinstance(config, dict) or not sections <= config.keys():
            raise ValueError(f"{path}/run.json holds no configuration of a run")
        if not trains and "split" not in run:
            raise ValueError(f"{path} is not the folder of a run: it has no config.json")
        return cls(path, trains, run)

    @property
    def config(self) -> dict:
        return self.run["config"]

    @property
    def arms(self) -> list[str]:
        return list(self.config["run_arms"]) if self.trains else []

    @property
    def arms_of_all_starts(self) -> set[str]:
        """The arms of the last start and those that an earlier one had and the last one left out."""
        starts = self.run.get("earlier_starts", [])
        return {*self.arms, *(arm for start in starts for arm in start.get("run_arms", ()))}

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end; an evaluation's folder is written at its end."""
        return not self.trains or workdir_lib.has_ended(self.run)

    @property
    def is_recorded(self) -> bool:
        """Whether every start of the run wrote down what it used. Older versions did not."""
        return all(start.get("record") for start in [self.run, *self.run.get("earlier_starts", [])])

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    @functools.cache  # noqa: B019, a folder lives as long as the audit
    def json(self, name: str) -> Any:
        """Read a JSON file. Raises ValueError with its name if it is missing or not valid."""
        return _read_json(self.path, name)

    @functools.cache  # noqa: B019
    def rows(self, name: str) -> list[dict]:
        """Read a JSONL file. Raises ValueError with its name, and the line, if it is missing or not valid."""
        rows, lines = [], _read_text(self.path, name).splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number == len(lines) and not self.is_finished:
                    break  # a run that was killed leaves half a line
                raise ValueError(f"{name}, line {number} is not valid JSON") from None
        return rows

    def text(self, name: str) -> str:
        return _read_text(self.path, name)

    @functools.cached_property
    def data(self) -> tuple[list[dict], list[dict]]:
        """The rows of all splits, and the other contexts, as data.jsonl numbers them."""
        lines = self.rows(DATA_FILE)
        return [line for line in lines if "split" in line], [line for line in lines if "other_context_of" in line]

    @functools.cached_property
    def results(self) -> dict[str, dict]:
        """The content of results.json; {} if it is missing or cannot be read, which is a check of its own."""
        try:
            found = self.json("results.json")
        except ValueError:
            return {}
        return found if isinstance(found, dict) and all(isinstance(row, dict) for row in found.values()) else {}

    @property
    def evaluations(self) -> list[Evaluated]:
        """The evaluations that a finished folder must have, or that an unfinished one has.

        The results of an unfinished run are those of its earlier end, if it has any; they are left out.
        """
        results = self.results if self.is_finished else {}
        if not self.trains:
            return [Evaluated(name, name, self.run["split"], 0, row) for name, row in results.items()]
        found = [("base", "base", "test", 0), ("base", "base/dev", "dev", 0)]
        found += [("teacher", "teacher", "test", 0)] * ("teacher" in self.run.get("inputs", {}))
        found += [(arm, arm, "test", self.config["train"]["steps"]) for arm in self.arms]
        found = [Evaluated(*one, results.get(one[0]) if one[2] == "test" else None) for one in found]
        for arm in self.arms:
            selected = results.get(arm, {}).get("selected")
            if selected is not None:
                found.append(Evaluated(arm, f"{arm}/selected", "test", selected.get("step"), selected))
        if self.is_finished:
            return found
        made = [one for one in found if self.has(f"{one.folder}/evaluation.json")]
        return [one._replace(step=self._read_step(one)) for one in made]

    def _read_step(self, one: Evaluated) -> int:
        try:
            return self.json(f"{one.folder}/evaluation.json")["of"]["step"]
        except (KeyError, TypeError, ValueError):  # its checks say so
            return one.step

    @functools.cached_property
    def experiment(self) -> Experiment:
        one_device = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "slices": 0}}
        try:
            return config_lib.experiment(ConfigDict(self.config | one_device), device_count=1, trains=False)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration does not fit this version of ctxjax: {error}") from None

    @functools.cached_property
    def opened(self) -> Opened:
        """The task and the tokenizer, if they are here and are what the run read."""
        try:
            settings = self.experiment.task_config
            if not self.trains and hasattr(settings, "required"):
                settings = dataclasses.replace(settings, required=False)
            task = TASKS[self.experiment.task][1](settings)
        except (OSError, ValueError) as error:
            return Opened(None, None, [f"the task's data is not here ({error})"])
        recorded = self.run.get("inputs", {}).get("rows")
        now = {split: compute_digest(task.rows(split)) for split in SPLITS} if recorded else task.facts
        if json.loads(json.dumps(now)) != (recorded or self.run.get("task")):
            return Opened(None, None, ["the task's data here is not the data that the run read"])
        try:
            path = self.experiment.model.path
            return Opened(task, load_tokenizer(find_folder(path, weights=False)) if path else task.tokenizer(), [])
        except (OSError, ValueError) as error:
            return Opened(task, None, [f"the model's tokenizer is not here ({error})"])


def _read_text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{name} is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_read_text(folder, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
