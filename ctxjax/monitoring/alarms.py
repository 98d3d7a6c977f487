"""Alarms: find problems in the rows of a run's metrics that do not stop training by themselves.

An alarm holds in a row if its metric is beyond its threshold. It is warned of once, and marked as ``alarm/NAME`` in
every row of metrics.jsonl in which it holds. results.json and the report list it with the step at which it was raised,
its message, and the number of rows in which it held. It ends the run if ``config.alarms.stop`` names it.

A run that is resumed reads its own rows again, and takes the alarms that are marked in them. With ``train.log_every``
above 1 these are the rows that were due or have an alarm. What the other rows would add is forgotten: to the moving
average of the agreement, and to the rows in which an alarm held before it was raised.

The agreement of student and teacher is that of their most likely tokens, which the losses compute anyway. The overlap
of their top k would need a sort along the sharded vocabulary at every token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import dataclasses
import operator
import sys
from typing import NamedTuple

from ctxjax.types import bounded

SMOOTHING = 0.8  # weight of the past in the moving average of the agreement, per step


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """``stop``: names of ALARMS that end the run. ``patience``: consecutive rows in which an alarm must hold before it
    is raised, or, if it is raised at once, before it ends the run. The others are thresholds; 0 turns an alarm off.
    """

    stop: tuple[str, ...] = ("not_finite",)
    patience: int = 3
    untrained: float = bounded(0.5, zero=True, at_most=1.0)
    logprob_gap: float = bounded(0.05, zero=True)
    truncated: float = bounded(0.5, zero=True, at_most=1.0)
    repetition: float = bounded(0.3, zero=True, at_most=1.0)
    no_distillation: float = bounded(1e-6, zero=True)
    parse_rate: float = bounded(0.3, zero=True, at_most=1.0)
    agreement: float = bounded(0.2, zero=True, at_most=1.0)
    context_use: float = bounded(0.2, zero=True, at_most=1.0)


class Alarm(NamedTuple):
    """An alarm that holds if ``metric``, of the row or of _Falls, is ``beyond`` the threshold.

    The threshold is ``fixed``, or else the field of AlarmsConfig with the alarm's name. ``message`` may use the metrics
    by name. ``at_once``: the alarm is raised in the first row in which it holds.
    """

    metric: str
    message: str
    beyond: Callable[[float, float], bool] = operator.gt
    fixed: float | None = None
    at_once: bool = False


class StopRun(RuntimeError):
    """The alarm ``alarm``, in the row of ``step``, ends the run."""

    def __init__(self, message: str, alarm: str, step: int):
        super().__init__(message)
        self.alarm, self.step = alarm, step


class Alarms:
    """The alarms of one arm.

    ``raised``: alarm -> the step at which it was first raised. ``messages``: alarm -> its message at that step.
    ``held``: alarm -> number of rows in which it held from then on. ``skipped``: number of skipped steps.
    """

    def __init__(self, config: AlarmsConfig, arm: str):
        self._config, self._arm = config, arm
        self._falls, self._in_a_row = _Falls(), Counter()
        self._last: Counter[str] = Counter()  # alarm -> step of the last row that had its metric
        self.raised: dict[str, int] = {}
        self.messages: dict[str, str] = {}
        self.held: Counter[str] = Counter()
        self.skipped = 0

    def observe(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """Return the metrics that the alarms add to a row. Warn of alarms that are raised."""
        added = self._falls.update(row)
        row = row | added
        for name in self._find_beyond(step, row):
            if ALARMS[name].at_once or self._in_a_row[name] >= self._config.patience:
                added[f"alarm/{name}"] = 1.0
                if name not in self.raised:
                    print(f"warning: {self._describe(name, step, row)}", file=sys.stderr, flush=True)
                self._note(name, step, row)
        return added

    def replay(self, step: int, row: dict[str, float]) -> None:
        """Take a row into account that an earlier process observed and wrote: the alarms are those marked in it, also
        if the thresholds have changed since."""
        row = self._falls.update(row) | row
        beyond = self._find_beyond(step, row)
        for name in ALARMS:
            if f"alarm/{name}" not in row:
                continue
            if name in beyond:
                least = 1 if ALARMS[name].at_once else self._config.patience
                self._in_a_row[name] = max(self._in_a_row[name], least)
            self._note(name, step, row)

    def _find_beyond(self, step: int, row: dict[str, float]) -> list[str]:
        """Return the alarms whose metric is beyond its threshold, and count in how many rows in a row it is."""
        self.skipped += int(row.get("skipped", 0))
        found = []
        for name, alarm in ALARMS.items():
            threshold = alarm.fixed if alarm.fixed is not None else getattr(self._config, name)
            off = alarm.fixed is None and not threshold
            if off or alarm.metric not in row:
                continue
            # A step between that was not written had no alarm. Rows of dev are all written.
            is_next = alarm.metric.startswith("dev/") or step <= self._last[name] + 1
            before = self._in_a_row[name] if is_next else 0
            self._last[name] = step
            holds = alarm.beyond(row[alarm.metric], threshold)
            self._in_a_row[name] = before + 1 if holds else 0
            if holds:
                found.append(name)
        return found

    def _note(self, name: str, step: int, row: dict[str, float]) -> None:
        self.held[name] += 1
        if name not in self.raised:
            self.raised[name], self.messages[name] = step, ALARMS[name].message.format(**row)

    def stop_if_due(self, step: int, row: dict[str, float]) -> None:
        """Raise StopRun if an alarm of ``alarms.stop`` has held for ``alarms.patience`` observed rows in a row."""
        for name in self._config.stop:
            if f"alarm/{name}" in row and self._in_a_row[name] >= self._config.patience:
                raise StopRun(
                    f"{self._describe(name, step, row)}. This ends the run, since alarms.stop names {name!r}, after "
                    f"alarms.patience = {self._config.patience} in a row; its files and checkpoints are kept. A "
                    'training goes on with --config.alarms.stop="()" or, if it has other arms, without '
                    f"{self._arm} in --config.run_arms",
                    name,
                    step,
                )

    @property
    def record(self) -> dict:
        """The alarms as results.json lists them."""
        alarms = {
            name: {"step": step, "rows": self.held[name], "message": self.messages[name]}
            for name, step in self.raised.items()
        }
        return {"alarms": alarms, "skipped_steps": self.skipped}

    @property
    def is_close_to_stopping(self) -> bool:
        """Whether one more skipped step ends the run; the state of that step is then needed."""
        in_a_row = self._in_a_row["not_finite"] + 1
        return "not_finite" in self._config.stop and in_a_row >= self._config.patience

    def _describe(self, name: str, step: int, row: dict[str, float]) -> str:
        return f"{self._arm}, step {step}: {ALARMS[name].message.format(**row)}"


class _Falls:
    """How far a share has fallen below its best so far; for the agreement, its moving average."""

    def __init__(self):
        self._best: dict[str, float] = {}
        self._smooth: float | None = None

    def update(self, row: dict[str, float]) -> dict[str, float]:
        """Return the falls of a row, and take it into account."""
        falls = {}
        agreement = row.get("top1_agreement")
        if agreement is not None and agreement == agreement:  # a skipped step has none
            past = agreement if self._smooth is None else self._smooth
            self._smooth = SMOOTHING * past + (1 - SMOOTHING) * agreement
            falls["agreement_fall"] = self._below_best("agreement", self._smooth)
        parsed = [self._below_best(view, row[view]) for view in ("dev/parse_x", "dev/parse_xc") if view in row]
        if parsed:
            falls["dev/parse_fall"] = max(parsed)
        if "dev/acc_xc" in row:
            falls["dev/acc_xc_fall"] = self._below_best("dev/acc_xc", row["dev/acc_xc"])
        return falls

    def _below_best(self, name: str, value: float) -> float:
        self._best[name] = max(self._best.get(name, value), value)
        return self._best[name] - value


ALARMS = {
    "not_finite": Alarm(
        "skipped",
        "the loss or its gradient is not a finite number (loss = {loss}, grad_norm = {grad_norm}), and the step was "
        "skipped; lower optim.lr, or compute in float32 (model.dtype)",
        fixed=0.0,
        at_once=True,
    ),
    "untrained": Alarm(
        "untrained",
        "{untrained:.0%} of the responses have no token that is trained on; check loss.skip_first, loss.masked_ids "
        "and loss.drop_truncated",
    ),
    "logprob_gap": Alarm(
        "logprob_gap",
        "the log-probabilities of sampling and scoring differ by {logprob_gap:.3g} nats per token, so training is not "
        "on-policy; compute in float32 (model.dtype)",
    ),
    "truncated": Alarm(
        "truncated", "{truncated:.0%} of the responses are cut at the length limit; raise rollout.max_tokens"
    ),
    "no_end": Alarm(
        "truncated",
        "no response ends, all are cut at the length limit; raise rollout.max_tokens, and check that the model's end "
        "token is in its generation_config.json (--dump_batch shows the first responses)",
        beyond=operator.ge,
        fixed=1.0,
    ),
    "repetition": Alarm(
        "repetition",
        "the responses repeat themselves: {repetition:.0%} of their 8-grams of tokens occurred before in the same "
        "response; read samples, and lower optim.lr if they were better before",
    ),
    "no_distillation": Alarm(
        "distill",
        "there is nothing to distill, L_distill = {distill:.2g}: the teacher with the context answers as the student "
        "without it. Check that the context is in the prompts (--dump_batch) and changes the answers",
        beyond=lambda value, least: abs(value) <= least,  # with loss.remainder = "raw" it may be negative
    ),
    "parse_rate": Alarm(
        "dev/parse_fall",
        "the share of dev responses with a readable answer has fallen by {dev/parse_fall:.0%} from its best, so the "
        "accuracies say little; read samples, and lower optim.lr",
        at_once=True,
    ),
    "agreement": Alarm(
        "agreement_fall",
        "student and teacher agree on the most likely token less often than before, by {agreement_fall:.0%} of the "
        "tokens; training diverges: lower optim.lr",
    ),
    "context_use": Alarm(
        "dev/acc_xc_fall",
        "accuracy with the context has fallen to {dev/acc_xc:.0%}, by {dev/acc_xc_fall:.0%} from its best: the student "
        "no longer uses the context, or is harmed by it. Let the anchor wait (loss.beta_ramp, loss.gate, "
        "loss.anchor=handover), or add retention (the arm opcd_retained)",
        at_once=True,
    ),
}
