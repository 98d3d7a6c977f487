"""Send what metrics.jsonl gets to Weights & Biases or Trackio, too, if config.logging names a project there.

Both are optional packages with the same interface: ``init`` returns a run with ``log`` and ``finish``. An arm is one of
their runs; its group is the workdir. A tracker that fails is left out from then on: training goes on, and metrics.jsonl
has everything.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import importlib
import importlib.util
from pathlib import Path
import sys

from ctxjax.host import processes
from ctxjax.host.checksum import compute_digest


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """See configs/base.py, ``config.logging``. A field has the name of its package and holds a project's; "": off."""

    wandb: str
    trackio: str


def check_installed(config: LoggingConfig) -> None:
    """Raise ValueError if a project is named whose package is not installed."""
    for package, project in dataclasses.asdict(config).items():
        if project and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"logging.{package} = {project!r} needs the package {package}: pip install 'ctxjax[{package}]' (in a "
                f"clone: pip install -e '.[{package}]'), or leave logging.{package} empty"
            )


class Trackers:
    """The runs of one arm in the configured projects. ``folder``: the arm's. ``facts``: the configuration to show.
    ``started``: when the run was started for the first time."""

    def __init__(self, config: LoggingConfig, folder: Path, facts: dict, started: str):
        self._runs = {}
        if not processes.is_first():
            return
        for package, project in dataclasses.asdict(config).items():
            if project:
                self._try(package, self._open, package, project, folder, facts, started)

    def _open(self, package: str, project: str, folder: Path, facts: dict, started: str) -> None:
        group, run = folder.parent.name, compute_digest([str(folder.parent.resolve()), started])
        # A resumed run goes on under its id. Folders of the same name, as in a study, are different runs.
        options = {"id": f"{run}-{folder.name}"} if package == "wandb" else {}
        self._runs[package] = importlib.import_module(package).init(
            project=project, name=f"{group}/{folder.name}", group=group, config=facts, resume="allow", **options
        )

    def log(self, row: dict[str, float]) -> None:
        """Send a row of metrics.jsonl: its numbers, under its step."""
        numbers = {name: value for name, value in row.items() if name not in ("step", "time")}
        for package, run in list(self._runs.items()):
            self._try(package, run.log, numbers, step=row["step"])

    def close(self) -> None:
        """End the runs, which sends what is left."""
        for package, run in list(self._runs.items()):
            self._try(package, run.finish)
        self._runs.clear()

    def _try(self, package: str, action: Callable, *given, **named) -> None:
        """Take the action; if it fails, warn, and do without the tracker from then on."""
        try:
            action(*given, **named)
        except Exception as error:  # theirs: a login, a network, a version
            self._runs.pop(package, None)
            why = f"{type(error).__name__}: {error}"
            print(f"warning: {package} gets no metrics from now on ({why})", file=sys.stderr, flush=True)
