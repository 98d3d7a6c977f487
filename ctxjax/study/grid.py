"""The grid of a study: which runs it has, with which configuration each, and which learning rate each arm gets.

A cell is one run (``ctxjax.main``) of one configuration with one seed, with all arms in it: base and teacher's samples
are made and evaluated once for all of them. There are two phases. The cells of the first train every arm at every rate
of the grid and are judged on dev; the cells of the second, with other seeds, train every arm at the rate that was best
for it, in its own configuration or in a similar one. Only these are reported.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from ctxjax import config as config_lib
from ctxjax.config_fields import one_of, require
from ctxjax.config_sections import Experiment
from ctxjax.evaluation.select import check_select, check_select_is_measured
from ctxjax.host import command

RATE, FINAL = "rate", "final"  # the phases


@dataclasses.dataclass(frozen=True)
class Study:
    """See configs/study.py, which declares all fields.

    Raises ValueError if a name is not known or a table is empty.
    """

    configurations: dict[str, str]
    own_changes: dict[str, dict]
    arms: dict[str, dict]
    run_arms: tuple[str, ...]
    more_arms: dict[str, tuple[str, ...]]
    left_out: dict[str, tuple[str, ...]]
    first_arm: str
    rates: tuple[float, ...]
    rates_of: dict[str, str]
    rate_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    select: tuple[str, ...]
    changes: dict
    rate_changes: dict

    def __post_init__(self):
        for field in ("configurations", "run_arms", "rates", "seeds", "select"):
            require(bool(getattr(self, field)), field, getattr(self, field), "at least one")
        for field in ("more_arms", "left_out", "own_changes", "rates_of"):
            for configuration in getattr(self, field):
                one_of(field, configuration, self.configurations)
        for configuration, other in self.rates_of.items():
            field = f"rates_of.{configuration}"
            one_of(field, other, [name for name in self.configurations if name not in self.rates_of])
            missing = [arm for arm in self.arms_of(configuration) if arm not in self.arms_of(other)]
            require(not missing, field, other, f"a configuration with the arms {', '.join(missing)}")
        for arm in {arm for configuration in self.configurations for arm in self.arms_of(configuration)}:
            one_of("run_arms", arm, self.arms)
        for configuration in self.configurations:
            one_of("first_arm", self.first_arm, self.arms_of(configuration))
        require(
            bool(self.rate_seeds) or len(self.rates) == 1, "rate_seeds", self.rate_seeds, "at least one for two rates"
        )
        common = sorted({*self.rate_seeds} & {*self.seeds})
        require(not common, "rate_seeds", self.rate_seeds, f"others than seeds, and both have {common}")
        for select in self.select:
            check_select(select)

    @classmethod
    def of(cls, config: ConfigDict) -> Study:
        """Convert a study's configuration. Raises ValueError with the field that is missing, unknown or wrong."""
        values = {"left_out": {}, "rates_of": {}} | config.to_dict()
        known = [field.name for field in dataclasses.fields(cls)]
        for field in values:
            one_of("the study's field", field, known)
        for field in known:
            require(field in values, field, None, "set; configs/study.py has all fields")
        return cls(**values)

    def rated_in(self, configuration: str) -> str:
        """Return the configuration whose first phase chooses the rates of this one."""
        return self.rates_of.get(configuration, configuration)

    def arms_of(self, configuration: str) -> tuple[str, ...]:
        arms, left_out = (*self.run_arms, *self.more_arms.get(configuration, ())), self.left_out.get(configuration, ())
        return tuple(arm for arm in arms if arm not in left_out)


class Cell(NamedTuple):
    """One run of the study; ``phase`` is RATE or FINAL."""

    configuration: str
    phase: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.configuration}-{self.phase}{self.seed}"


def list_cells(study: Study) -> list[Cell]:
    """Return all cells: for each configuration those of the first phase, then those of the second."""

    def seeds(configuration: str, phase: str) -> tuple[int, ...]:
        if phase == FINAL:
            return study.seeds
        return study.rate_seeds if len(study.rates) > 1 and study.rated_in(configuration) == configuration else ()

    places = [(name, phase) for name in study.configurations for phase in (RATE, FINAL)]
    return [Cell(*place, seed) for place in places for seed in seeds(*place)]


def first_cells(study: Study, configuration: str) -> list[Cell]:
    """Return the cells of the first phase that choose the rates of a configuration."""
    return [c for c in list_cells(study) if (c.configuration, c.phase) == (study.rated_in(configuration), RATE)]


def name_at_rate(arm: str, place: int) -> str:
    """Return the name that ``arm`` has in a cell of the first phase at the rate of this place in the grid."""
    return f"{arm}-{place}"


def make_config(study: Study, cell: Cell, rates: dict[str, float] | None = None) -> ConfigDict:
    """Return the configuration of a cell's run; ``rates``: arm -> learning rate, for the second phase."""
    config = command.load_config(study.configurations[cell.configuration])
    config.update(ConfigDict(study.changes))
    config.update(ConfigDict(study.own_changes.get(cell.configuration, {})))
    config.seed = cell.seed
    arms = study.arms_of(cell.configuration)
    if cell.phase == RATE:
        config.update(ConfigDict(study.rate_changes))
        config.eval.every = config.train.steps
        made = {
            name_at_rate(arm, place): study.arms[arm] | {"lr": rate}
            for arm in arms
            for place, rate in enumerate(study.rates)
        }
    else:
        made = {arm: study.arms[arm] | {"lr": rates[arm]} for arm in arms}
    config.arms, config.run_arms = ConfigDict(made), tuple(made)
    return config.copy_and_resolve_references()


def check_study(study: Study) -> dict[Cell, float]:
    """Check the configuration of every cell. Return how much work each is: cheap ones are to come first.

    Raises ValueError with the cell, the field and its value. The number is in arbitrary units; it counts response
    tokens of training, weighted by the passes of an arm.
    """
    costs = {}
    for cell in list_cells(study):
        rates = dict.fromkeys(study.arms_of(cell.configuration), study.rates[0])
        try:
            experiment = config_lib.experiment(make_config(study, cell, rates), device_count=1)
            for select in study.select if cell.phase == RATE else ():
                check_select_is_measured(select, experiment.eval)
            costs[cell] = _estimate_cost(experiment)
        except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{cell.name}: {error}") from None
    return costs


def _estimate_cost(config: Experiment) -> float:
    passes = sum(3 + 2 * (loss.beta > 0) + 4 * (loss.mu > 0) for loss in config.arms.values())
    rows = config.train.steps * config.train.batch_size * passes + 3 * config.base.steps * config.base.batch_size
    return rows * config.rollout.max_tokens * config.base.width**2 * config.base.layers


def choose_rates(study: Study, configuration: str, score: Callable[[Cell, str], tuple[float, ...]]) -> dict[str, float]:
    """Return the rate of every arm: the best one in the configuration that chooses for this one.

    ``score(cell, name)``: the values of ``study.select`` on dev at the end of the first phase, higher is better, of the
    arm of that ``name`` in that run; NaN for a value that is not defined. Their means over the cells are compared, the
    later ones only if all earlier ones are equal, and of equal rates the lowest is taken.
    """
    cells = first_cells(study, configuration)
    if not cells:
        return dict.fromkeys(study.arms_of(configuration), study.rates[0])

    def rank(arm: str, place: int) -> tuple[float, ...]:
        columns = zip(*(score(cell, name_at_rate(arm, place)) for cell in cells), strict=True)
        means = (math.fsum(column) / len(cells) for column in columns)
        return *(-math.inf if math.isnan(mean) else mean for mean in means), -study.rates[place]

    places = range(len(study.rates))
    return {arm: study.rates[max(places, key=lambda p: rank(arm, p))] for arm in study.arms_of(configuration)}
