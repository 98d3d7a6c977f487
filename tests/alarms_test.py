"""Each alarm is raised by the rows it is meant for and by no others, warned of once, and may end the run."""

import jax
import numpy as np
import pytest

from ctxjax import main
from ctxjax.distill.response_stats import repetition
from ctxjax.monitoring.alarms import ALARMS, Alarms, AlarmsConfig, StopRun
from ctxjax.types import Rollout

# A step of the run of configs/tiny.py, and its evaluation.
HEALTHY = {
    "loss": 0.02, "grad_norm": 0.3, "skipped": 0.0, "untrained": 0.0, "logprob_gap": 1e-7, "truncated": 0.0,
    "repetition": 0.01, "distill": 0.02, "top1_agreement": 0.95, "dev/parse_x": 1.0, "dev/parse_xc": 0.99,
    "dev/acc_xc": 0.98,
}  # fmt: skip
STEP = {key: value for key, value in HEALTHY.items() if not key.startswith("dev/")}
NAN = float("nan")
# For each alarm: what is wrong in every row from the fourth on, and what is no reason yet.
WRONG = {
    "not_finite": ({"loss": NAN, "grad_norm": NAN, "skipped": 1.0, "distill": NAN, "top1_agreement": NAN}, {}),
    "untrained": ({"untrained": 0.6}, {"untrained": 0.5}),
    "logprob_gap": ({"logprob_gap": 0.2}, {"logprob_gap": 0.02}),
    "truncated": ({"truncated": 0.7}, {"truncated": 0.4}),
    "no_end": ({"truncated": 1.0}, {"truncated": 0.99}),
    "repetition": ({"repetition": 0.9}, {"repetition": 0.2}),
    "no_distillation": ({"distill": 1e-9}, {"distill": 1e-5}),
    "parse_rate": ({"dev/parse_xc": 0.5}, {"dev/parse_xc": 0.8}),
    "agreement": ({"top1_agreement": 0.4}, {"top1_agreement": 0.8}),
    "context_use": ({"dev/acc_xc": 0.7}, {"dev/acc_xc": 0.85}),
}
AT_ONCE = {"not_finite", "parse_rate", "context_use"}


def observed(rows: list[dict], **config) -> Alarms:
    alarms = Alarms(AlarmsConfig(**config), "opcd")
    for step, row in enumerate(rows, 1):
        added = alarms.observe(step, row)
        alarms.stop_if_due(step, row | added)
    return alarms


def kept_rows(rows: list[dict], log_every: int = 1, **config) -> list[dict]:
    """The rows of metrics.jsonl that a run with these steps leaves."""
    alarms, kept = Alarms(AlarmsConfig(**config), "opcd"), []
    for step, row in enumerate(rows, 1):
        row = {"step": step} | row | alarms.observe(step, row)
        is_due = step % log_every == 0 or any(key.startswith("dev/") for key in row)
        if is_due or any(key.startswith("alarm/") for key in row):
            kept.append(row)
    return kept


def replayed(kept: list[dict], **config) -> Alarms:
    alarms = Alarms(AlarmsConfig(**config), "opcd")
    for row in kept:
        alarms.replay(row["step"], row)
    return alarms


def steps_of(name: str) -> list[dict]:
    """The rows of a run in which an alarm holds from the fourth on: of steps alone, unless it is one of dev."""
    wrong = WRONG[name][0]
    healthy = HEALTHY if any(key.startswith("dev/") for key in wrong) else STEP
    return [healthy] * 3 + [healthy | wrong] * 20


def story(changes: dict, bad_rows: int = 20) -> list[dict]:
    return [HEALTHY] * 3 + [HEALTHY | changes] * bad_rows


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_raised_once_by_what_it_is_meant_for(name, capsys):
    wrong, _ = WRONG[name]
    alarms = observed(story(wrong), stop=())
    expected = {name, "truncated"} if name == "no_end" else {name}
    assert alarms.raised.keys() == expected
    if name != "agreement":  # which is smoothed
        assert alarms.raised[name] == (4 if name in AT_ONCE else 6)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(expected) and all(line.startswith("warning: opcd, step ") for line in warnings)


@pytest.mark.parametrize("name", ALARMS)
def test_healthy_rows_and_small_changes_raise_nothing(name, capsys):
    _, harmless = WRONG[name]
    alarms = observed(story(harmless), stop=(), truncated=0.0 if name == "no_end" else 0.5)
    assert alarms.raised == {} and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ALARMS)
def test_two_bad_rows_are_no_reason_to_stop_but_three_in_a_row_are(name):
    wrong, _ = WRONG[name]
    blinks = [HEALTHY, HEALTHY, HEALTHY | wrong, HEALTHY | wrong] * (1 if name == "agreement" else 5)
    observed(blinks, stop=(name,))
    with pytest.raises(StopRun, match=f"^opcd, step .* ends the run, since alarms.stop names '{name}'") as stop:
        observed(story(wrong), stop=(name,))
    assert stop.value.alarm == name and (stop.value.step == 6 or name == "agreement")
    observed(story(wrong), stop=tuple(ALARMS.keys() - {name, "truncated"}))


@pytest.mark.parametrize("patience", [1, 5])
@pytest.mark.parametrize("name", ALARMS)
def test_patience_is_how_many_rows_in_a_row_warn_and_stop(name, patience):
    rows = story(WRONG[name][0])
    first_bad = 4
    if name == "agreement":  # which is smoothed
        first_bad = observed(rows, stop=(), patience=1).raised[name]
        assert first_bad >= 4
    alarms = observed(rows, stop=(), patience=patience)
    last = first_bad + patience - 1
    assert alarms.raised[name] == (first_bad if name in AT_ONCE else last)
    assert alarms.held[name] == len(rows) + 1 - alarms.raised[name]
    with pytest.raises(StopRun, match=f"alarms.patience = {patience} in a row") as stop:
        observed(rows, stop=(name,), patience=patience)
    assert stop.value.step == last


@pytest.mark.parametrize("name", [name for name, alarm in ALARMS.items() if alarm.fixed is None])
def test_a_threshold_of_zero_turns_an_alarm_off(name):
    assert observed(story(WRONG[name][0]), **{name: 0.0}).raised.keys() <= {"no_end"}


@pytest.mark.parametrize("name", ALARMS)
def test_rows_in_which_it_holds_are_marked(name):
    wrong, _ = WRONG[name]
    alarms = Alarms(AlarmsConfig(stop=()), "opcd")
    marks = [f"alarm/{name}" in alarms.observe(step, row) for step, row in enumerate(story(wrong), 1)]
    assert marks.index(True) + 1 == alarms.raised[name] and all(marks[marks.index(True) :])
    record = alarms.record["alarms"][name]
    assert record["step"] == alarms.raised[name] and record["rows"] == sum(marks)
    assert record["message"] and "{" not in record["message"]


@pytest.mark.parametrize("name", ALARMS)
def test_a_run_that_reads_its_rows_again_goes_on_as_one_that_was_not_interrupted(name, capsys):
    """With every log_every, although a run keeps only the rows that were due or in which an alarm held."""
    rows = steps_of(name)
    for log_every in (1, 4):
        whole, kept = observed(rows, stop=()), kept_rows(rows, log_every, stop=())
        capsys.readouterr()
        resumed = replayed(kept, stop=())
        assert resumed.record == whole.record and resumed.held[name] > 0
        assert capsys.readouterr().err == ""
        assert resumed.skipped == (20 if name == "not_finite" else 0)
        if name == "agreement" and log_every > 1:  # its moving average is not known
            continue
        marks = [alarms.observe(len(rows) + 1, rows[-1]).get(f"alarm/{name}") for alarms in (whole, resumed)]
        assert marks == [1.0, 1.0] and resumed.record == whole.record
        stopping = replayed(kept, stop=(name,))
        with pytest.raises(StopRun) as stop:
            stopping.stop_if_due(len(rows) + 1, rows[-1] | stopping.observe(len(rows) + 1, rows[-1]))
        assert stop.value.alarm == name


@pytest.mark.parametrize("name", ALARMS)
def test_a_run_that_goes_on_with_other_thresholds_keeps_the_alarms_of_its_rows(name):
    rows = steps_of(name)
    before, kept = observed(rows, stop=()), kept_rows(rows)
    off = dict.fromkeys(AlarmsConfig.__dataclass_fields__.keys() - {"stop", "patience"}, 0.0)
    assert replayed(kept, stop=(name,), **off).record == before.record


def test_bad_rows_with_others_between_them_that_were_not_written_are_not_in_a_row():
    """Every fourth step is truncated and written; the steps between are not."""
    rows = [STEP | ({"truncated": 0.7} if step % 4 == 0 else {}) for step in range(1, 25)]
    assert observed(rows).raised == {} and replayed(kept_rows(rows, 4)).raised == {}
    bad, stops = STEP | WRONG["not_finite"][0], {"patience": 2, "stop": ("not_finite",)}
    alarms = replayed(kept_rows([bad, STEP, bad, STEP, STEP], 10), **stops)
    alarms.stop_if_due(6, bad | alarms.observe(6, bad))  # the first in a row
    with pytest.raises(StopRun):
        alarms.stop_if_due(7, bad | alarms.observe(7, bad))


def test_a_step_is_waited_for_where_it_may_be_the_last():
    steps = [HEALTHY | WRONG["not_finite"][0]]
    for patience, before in ((1, []), (3, 2 * steps)):
        assert observed(before, patience=patience).is_close_to_stopping
        assert not observed(before, patience=patience, stop=()).is_close_to_stopping
    assert not observed(steps).is_close_to_stopping


def test_every_threshold_belongs_to_an_alarm_and_every_alarm_has_a_case():
    fields = AlarmsConfig.__dataclass_fields__.keys() - {"stop", "patience"}
    assert fields == {name for name, alarm in ALARMS.items() if alarm.fixed is None}
    assert ALARMS.keys() == WRONG.keys()


def test_the_command_says_why_it_stops_and_has_a_code_of_its_own(monkeypatch, capsys):
    def stopped(*_, **__):
        raise StopRun("opcd, step 4: too bad", "not_finite", 4)

    monkeypatch.setattr(main.command, "run", stopped)
    with pytest.raises(SystemExit) as end:
        main.command_line()
    assert end.value.code == 3 and capsys.readouterr().err == "\nstopped: opcd, step 4: too bad\n"


# --- Repetition ---


def slow_repetition(tokens, mask, n) -> float:
    again, total = 0, 0
    for row, length in zip(tokens, mask.sum(axis=1)):
        grams = [tuple(row[place : place + n]) for place in range(length - n + 1)]
        again, total = again + len(grams) - len(set(grams)), total + len(grams)
    return again / max(total, 1)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_repetition_is_the_share_of_ngrams_that_occurred_before(n, mesh8):
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, 3, (8, 24)).astype(np.int32)
    tokens[0], tokens[1] = 7, np.tile([1, 2, 3, 4, 5], 5)[:24]  # loops
    tokens[2] = np.arange(24)
    mask = np.arange(24) < rng.integers(1, 25, (8, 1))
    mask[:3] = True
    data = jax.device_put(Rollout(tokens, mask, np.zeros((8, 24), np.float32)), jax.P(("data", "fsdp")))
    measured = jax.jit(repetition, static_argnames="n")(data, n=n)
    assert float(measured.value) == pytest.approx(slow_repetition(tokens, mask, n))
    assert 0 < float(measured.value) < 1


def test_responses_shorter_than_an_ngram_do_not_repeat():
    rollout = Rollout(np.zeros((2, 5), np.int32), np.ones((2, 5), bool), np.zeros((2, 5), np.float32))
    assert float(repetition(rollout).value) == 0
