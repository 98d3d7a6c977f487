"""A whole run on two devices: its files, its arms, how it resumes; and a run on the user's own questions.

tiny_safety_test.py has a whole run on eight devices.
"""

import json
from pathlib import Path
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tqdm import tqdm

from ctxjax import config as config_lib, sharding
from ctxjax.audit import audit
from ctxjax.configs import tiny
from ctxjax.data import prompts
from ctxjax.data.worlds import rules
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, teacher_rollout
from ctxjax.evaluation import metrics, statistics
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.host import workdir as workdir_lib
from ctxjax.inputs import base_model, run_inputs, teacher_samples
from ctxjax.inputs.model_folder import open_folder
from ctxjax.monitoring.alarms import StopRun
from ctxjax.training import arm as arm_lib, batch_text, preview, run
from ctxjax.training.checkpoint import read_params, saved_steps
from ctxjax.types import Frozen

ARMS = ("opcd", "opcd_anchored", "opcd_retained")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_devices")]


def make_config(cache: Path):
    config = tiny.get_config()
    config.base.cache = str(cache)
    config.base.steps, config.base.warmup_steps, config.base.width, config.base.layers = 2, 1, 32, 1
    config.base.head_dim, config.base.mlp_width, config.base.batch_size = 8, 48, 16
    config.train.steps, config.train.batch_size, config.train.save_every, config.eval.every = 4, 8, 2, 2
    config.optim.warmup_steps = 1
    config.rules.train_questions, config.rules.dev_questions, config.rules.test_questions = 64, 20, 20
    config.eval.batch_size, config.eval.bootstrap = 16, 50
    return config


def run_once(config, workdir: Path, page: bool = False) -> dict:
    """Run and return the results. The report, which takes seconds, is written only if ``page``."""
    facts = workdir_lib.collect_facts(config)
    workdir_lib.check_workdir(workdir, facts["config"])
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr(run, "write_report", lambda workdir: None)
        return run.run(config_lib.experiment(config, jax.device_count()), workdir, facts)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, two_devices):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache):
    """(workdir, results) of a complete run of three arms."""
    workdir = cache / "run"
    return workdir, run_once(make_config(cache), workdir, page=True)


def test_results_contain_the_base_and_every_arm(finished):
    workdir, results = finished
    assert list(results) == ["base", *ARMS]
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    wanted = {"acc_x", "acc_xc", "gap", "harm", "benefit", "both_correct", "dlen", "view_kl", "cosine_by_layer", "n"}
    for arm in results.values():
        assert wanted | {"obedience", "acc_empty", "acc_paraphrase", "distill"} <= set(arm)
        assert arm["n"] == 20 and len(arm["cosine_by_layer"]) == 2
    for name in ARMS:
        written = read_rows(workdir / name / "metrics.jsonl")
        raised = {key for row in written for key in row if key.startswith("alarm/")}
        counts = {key.removeprefix("alarm/"): sum(key in row for row in written) for key in raised}
        assert {key: alarm["rows"] for key, alarm in results[name]["alarms"].items()} == counts
        assert results[name]["skipped_steps"] == 0


def test_items_have_every_question_once_in_every_view(finished):
    workdir, _ = finished
    for arm in ("base", *ARMS):
        items = read_rows(workdir / arm / "items.jsonl")
        pairs = {(item["id"], item["view"]) for item in items}
        assert len(items) == len(pairs) == 20 * 5
        assert {view for _, view in pairs} == {"bare", "context", "empty", "other", "paraphrase"}


def test_metrics_have_every_step_once_and_the_dev_evaluations(finished):
    workdir, _ = finished
    for arm in ARMS:
        written = read_rows(workdir / arm / "metrics.jsonl")
        assert [row["step"] for row in written if "loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in written if "dev/acc_x" in row] == [0, 2, 4]
        assert max(row.get("logprob_gap_max", 0) for row in written) < 1e-4
        assert list((workdir / arm / "events").glob("events.out.tfevents.*"))


def test_an_arm_computes_only_the_terms_of_its_loss(finished):
    workdir, _ = finished
    terms = {arm: set(read_rows(workdir / arm / "metrics.jsonl")[1]) & {"distill", "anchor", "retain"} for arm in ARMS}
    assert terms["opcd"] == {"distill"}
    assert terms["opcd_anchored"] == {"distill", "anchor"}
    assert terms["opcd_retained"] == {"distill", "anchor", "retain"}


def test_an_anchor_of_every_second_step_is_computed_only_then_with_twice_the_weight(finished, cache, tmp_path):
    config = make_config(cache)
    config.run_arms, config.loss.anchor_every = ("opcd_anchored",), 2
    run_once(config, tmp_path / "run")
    plain, every_step = (read_rows(finished[0] / arm / "metrics.jsonl") for arm in ("opcd", "opcd_anchored"))
    sparse = [row for row in read_rows(tmp_path / "run" / "opcd_anchored" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in sparse if "anchor" in row] == [2, 4]
    first = {name: value for name, value in sparse[0].items() if name not in ("time", "tokens_per_second")}
    plain = next(row for row in plain if "loss" in row)
    assert first == {name: plain[name] for name in first} and any("anchor" in row for row in every_step)
    beta = config.arms.opcd_anchored.beta
    np.testing.assert_allclose(sparse[1]["loss"], sparse[1]["distill"] + 2 * beta * sparse[1]["anchor"], rtol=1e-6)


def test_the_report_is_written_and_loads_nothing_from_the_network(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert "opcd_anchored" in page and "http" not in page.replace("http://www.w3.org", "")


def interrupt(config, workdir: Path) -> Path:
    """Interrupt a run in its third step, after the checkpoint of step 2. Return the workdir."""
    original = arm_lib.Writer.step

    def stop_in_step_3(self, step, metrics):
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, metrics)

    arm_lib.Writer.step = stop_in_step_3
    try:
        with pytest.raises(KeyboardInterrupt):
            run_once(config, workdir)
    finally:
        arm_lib.Writer.step = original
    return workdir


@pytest.fixture(scope="module")
def interrupted(finished, cache):
    """(configuration, workdir) of an interrupted run of all weights. Tests copy the workdir before they resume it."""
    config = make_config(cache)
    config.run_arms = ("opcd_retained",)
    return config, interrupt(config, cache / "stopped")


@pytest.mark.parametrize("rank", [0, 2], ids=["all_weights", "adapter"])
def test_an_interrupted_run_resumes_to_the_same_numbers(rank, finished, cache, request, tmp_path):
    arm = "opcd_retained"
    if rank:
        config = make_config(cache)
        config.run_arms, config.lora.rank = (arm,), rank
        workdir, again = cache / "adapter", interrupt(config, tmp_path / "run")
        uninterrupted = run_once(config, workdir)
    else:
        (workdir, uninterrupted), (config, before) = finished, request.getfixturevalue("interrupted")
        again = shutil.copytree(before, tmp_path / "run")
    results = run_once(config, again)
    before = [row["loss"] for row in read_rows(workdir / arm / "metrics.jsonl") if "loss" in row]
    after = [row["loss"] for row in read_rows(again / arm / "metrics.jsonl") if "loss" in row]
    assert len(before) == 4 and after == before
    assert results[arm]["view_kl"] == uninterrupted[arm]["view_kl"]
    assert read_rows(again / arm / "rows.jsonl") == read_rows(workdir / arm / "rows.jsonl")
    checks = list(audit.check_folder(again))
    assert [problem for check in checks for problem in check.wrong + check.unchecked] == []


def read_last_params(workdir: Path, arm: str, cache: Path) -> dict[str, np.ndarray]:
    """Read the parameters of an arm's last checkpoint as host arrays by name."""
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        folder = open_folder(next(cache.glob("rules-base-*")), mesh)
        params = read_params(workdir / arm / "checkpoints", 4, folder.params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1)], ids=str)
def test_a_run_interrupted_on_one_mesh_resumes_on_another_to_the_same_parameters(
    shape, finished, interrupted, cache, only, monkeypatch, tmp_path
):
    """From two shards of every matrix to one device, and to four shards that are replicated twice."""
    config, before = interrupted
    config, again = config.copy_and_resolve_references(), shutil.copytree(before, tmp_path / "run")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    only(int(np.prod(shape)), monkeypatch)
    stored = json.loads((finished[0] / "opcd_retained" / "evaluation.json").read_text())["of"]
    evaluation = Evaluation.load(finished[0] / "opcd_retained", stored)
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: evaluation)  # only training is tested
    run_once(config, again)
    monkeypatch.undo()
    expected, found = (read_last_params(workdir, "opcd_retained", cache) for workdir in (finished[0], again))
    first = read_last_params(finished[0], "opcd", cache)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(first[name] - expected[name]).max() for name in expected) > 1e-4
    losses = [
        [row["loss"] for row in read_rows(workdir / "opcd_retained" / "metrics.jsonl") if "loss" in row]
        for workdir in (finished[0], again)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_finished_run_is_not_evaluated_again_and_has_the_same_results(finished, cache, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")

    def fail(self, params, name):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Evaluator, "__call__", fail)
    (workdir / "results.json").unlink()
    run_once(make_config(cache), workdir)
    assert (workdir / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()
    stored = json.loads((workdir / "opcd" / "evaluation.json").read_text())
    stored["of"]["step"] = 2  # of another step
    (workdir / "opcd" / "evaluation.json").write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="evaluated again"):
        run_once(make_config(cache), workdir)


def test_the_checkpoint_that_is_best_on_dev_is_kept_and_evaluated_too(finished, cache, tmp_path):
    written = read_rows(finished[0] / "opcd" / "metrics.jsonl")
    first, last = (row["dev/distill"] for row in written if row.get("dev/distill") is not None and row["step"])
    config = make_config(cache)
    config.run_arms, config.eval.select = ("opcd",), "distill" if first > last else "-distill"
    config.train.save_every, config.train.keep = 4, 1
    results = run_once(config, tmp_path / "run", page=True)
    assert saved_steps(tmp_path / "run" / "opcd" / "checkpoints") == [2, 4]
    assert results["opcd"]["step"] == 4 and results["opcd"]["selected"]["step"] == 2
    assert results["opcd"]["selected"]["view_kl"] != results["opcd"]["view_kl"]
    assert "opcd, step 2, best on dev" in (tmp_path / "run" / "report.html").read_text()


UNKNOWN, OF_THIS_TASK = "is not a metric; choose from .*, -harm, ", "is not a metric of this task; choose from .*-harm"


@pytest.mark.parametrize(
    ("select", "stage", "message"),
    [
        *((select, "open_inputs", UNKNOWN) for select in ("accuracy", "--harm", "n")),
        *((select, "_evaluate_untrained", OF_THIS_TASK) for select in ("turns_x", "random_moves")),
    ],
)
def test_a_metric_to_select_by_that_the_run_never_has_is_refused_early(
    select, stage, message, cache, tmp_path, monkeypatch
):
    """``stage``: what has not begun by then."""
    monkeypatch.setattr(run, stage, None)
    config = make_config(cache)
    config.eval.select = select
    with pytest.raises(ValueError, match=f"eval.select = '{select}' {message}"):
        run_once(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_entry_in_the_table_of_metrics_is_enough_to_select_and_report_it(cache, tmp_path, monkeypatch, capsys):
    """The metric is in results.json, metrics.jsonl, the console's table and the report; the first arm is not opcd."""
    long = metrics.Metric(
        "long", "long", "share", "Responses of more than 10 tokens.", ("bare",),
        lambda bare: statistics.rate(bare.length > 10, bare.clusters), better="lower",
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, long))
    config = make_config(cache)
    config.run_arms, config.eval.select = ("opcd_anchored", "opcd"), "-long"
    results = run_once(config, tmp_path / "run", page=True)
    for arm, row in results.items():
        items = read_rows(tmp_path / "run" / arm / "items.jsonl")
        lengths = [item["length"] for item in items if item["view"] == "bare"]
        assert row["long"] == np.mean(np.array(lengths) > 10)
    assert "harm_minus_opcd_anchored" in results["opcd"]
    written = read_rows(tmp_path / "run" / "opcd" / "metrics.jsonl")
    on_dev = [row for row in written if "dev/long" in row]
    assert [row["step"] for row in on_dev] == [0, 2, 4]
    lowest = min(row["dev/acc_xc"] for row in on_dev[1:])
    assert results["opcd"]["lowest_acc_xc"] == lowest and "lowest_acc_xc" not in results["base"]
    assert results["opcd"]["context_loss"] == pytest.approx(max(on_dev[0]["dev/acc_xc"] - lowest, 0))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| arm ")]
    assert len(table) == 1 and table[0].endswith(" long % |")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>long %</th>" in page
    assert "<dt>long</dt><dd>Responses of more than 10 tokens. Lower is better.</dd>" in page


def test_an_arm_is_trained_at_its_own_rate(cache):
    config = make_config(cache)
    config.optim.schedule, config.run_arms, config.eval.every = "constant", ("opcd", "opcd_anchored"), 0
    config.arms.opcd_anchored.lr = 3e-4
    run_once(config, cache / "rates")
    last = [read_rows(cache / "rates" / arm / "metrics.jsonl")[-1]["lr"] for arm in config.run_arms]
    assert last == pytest.approx([config.optim.lr, 3e-4])


def test_the_sizes_of_parameters_and_optimiser_are_printed_once(cache, capsys):
    config = make_config(cache)
    config.arms.twin = config.arms.opcd_retained.copy_and_resolve_references()
    config.run_arms, config.lora.rank, config.eval.every = ("opcd_retained", "twin"), 2, 0
    run_once(config, cache / "sizes")
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("parameters: ")]
    assert len(lines) == 1
    (model,) = (line for line in printed if line.startswith("model: "))
    assert model.endswith("; float32, reference attention")
    assert json.loads((cache / "sizes" / "run.json").read_text())["arithmetic"] == "float32, reference attention"
    # Rank 2 on matrices of 32 x 32, 32 x 16 (twice), 32 x 32 and 32 x 48 (three times); Adam keeps two moments.
    assert lines[0].startswith("parameters: 928 trained (3.71 kB), ") and lines[0].endswith("optimiser: 7.43 kB")
    (held,) = (line for line in printed if line.startswith("twin: a step holds "))
    assert re.fullmatch(r"twin: a step holds [\d.]+ [kM]B of this machine's memory", held)
    assert printed[0].endswith(
        ": 4 steps of each of opcd_retained, twin, which learn to answer without the context as "
        "the teacher does with it"
    )


def test_a_run_with_a_shared_prefix_has_the_same_numbers(finished, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", 2)
    config = make_config(cache)
    config.run_arms = ("opcd_retained",)
    run_once(config, tmp_path / "run")
    workdirs = tmp_path / "run", finished[0]
    shared, expected = (read_rows(workdir / "opcd_retained" / "metrics.jsonl") for workdir in workdirs)
    for ours, theirs in zip(shared, expected, strict=True):
        for name in {"loss", "distill", "retain", "dev/view_kl", "dev/distill"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_steps_without_a_finite_loss_end_the_run_with_a_file_of_their_rows_and_keep_the_checkpoints(
    cache, tmp_path, monkeypatch, capsys
):
    def init_with_nan(*arguments):
        state = init_state(*arguments)
        return state.replace(params=state.params | {"final_norm": state.params["final_norm"].at[0].set(np.nan)})

    monkeypatch.setattr(arm_lib, "init_state", init_with_nan)
    config = make_config(cache)
    config.run_arms, config.train.save_every, config.eval.every = ("opcd_retained",), 1, 0
    bars = set(tqdm._instances)
    with pytest.raises(StopRun, match="opcd_retained, step 3: the loss .*loss = nan.*alarms.patience = 3") as stop:
        run_once(config, tmp_path / "run")
    folder = tmp_path / "run" / "opcd_retained"
    assert set(tqdm._instances) <= bars, "a progress bar is still open: the next message would be printed on its line"
    assert capsys.readouterr().err.count("warning: opcd_retained, step 1: the loss or its gradient") == 1
    written = read_rows(folder / "metrics.jsonl")[1:]
    assert [(row["step"], row["skipped"], row["alarm/not_finite"]) for row in written] == [(n, 1, 1) for n in (1, 2, 3)]
    bad_rows = read_rows(folder / "not_finite_step_3.jsonl")
    assert str(folder / "not_finite_step_3.jsonl") in str(stop.value)
    assert [row["view"] for row in bad_rows] == ["bare"] * 8 + ["other"] * 8
    assert all(row["loss"] is None and row["prompt"] and row["tokens"] for row in bad_rows)
    assert saved_steps(folder / "checkpoints") == [1, 2]


def test_another_configuration_in_the_same_workdir_is_refused_and_no_file_changes(finished, cache):
    workdir, _ = finished
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = make_config(cache)
    config.optim.lr = 1e-2
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*optim.lr: 0.001 -> 0.01"):
        run_once(config, workdir)
    assert files == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_base_is_trained_once_and_is_an_ordinary_folder(finished, cache):
    folders = list(cache.glob("rules-base-*"))
    assert len(folders) == 1
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert expected <= {path.name for path in folders[0].iterdir()}


def ensure_base(config) -> Path:
    """Return the folder of the configuration's base; train it if it is not in the cache."""
    experiment = config_lib.experiment(config, jax.device_count())
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        return base_model.ensure_base(experiment.base, experiment.task, rules.Rules(experiment.task_config), mesh)


def make_off_policy_config(cache: Path):
    """Configure two arms that learn from the teacher's samples: sft in all steps, opcd only in the first."""
    config = make_config(cache)
    config.run_arms, config.train.steps, config.train.save_every, config.eval.every = ("sft", "opcd"), 2, 2, 0
    config.arms.opcd.off_policy_steps = 1
    config.teacher.temperature = 0.5
    return config


@pytest.fixture(scope="module")
def sampled(cache):
    """The workdir of a run of these two arms."""
    run_once(make_off_policy_config(cache), cache / "sampled")
    return cache / "sampled"


def read_response_lengths(arm: Path) -> list[float]:
    return [row["response_length"] for row in read_rows(arm / "metrics.jsonl") if "response_length" in row]


def test_the_teachers_samples_are_stored_with_their_ids_and_shared_by_the_arms(sampled):
    kept = read_rows(sampled / teacher_samples.FILE)
    assert [row["step"] for row in kept] == [1] * 8 + [2] * 8
    assert len({(row["step"], row["id"]) for row in kept}) == 16 and all(row["question"] == row["id"] for row in kept)
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 19 for row in kept)
    length = [np.mean([len(row["tokens"]) for row in kept if row["step"] == step]) for step in (1, 2)]
    of_arm = {arm: read_response_lengths(sampled / arm) for arm in ("sft", "opcd")}
    assert of_arm["sft"] == pytest.approx(length)
    assert of_arm["opcd"][0] == pytest.approx(length[0]) and of_arm["opcd"][1] != pytest.approx(length[1])


def test_a_resumed_run_learns_from_the_stored_samples(sampled, cache, tmp_path):
    config = make_off_policy_config(cache)
    config.run_arms = ("sft",)
    workdir_lib.claim(tmp_path, workdir_lib.collect_facts(config), {})
    (tmp_path / "run.json").unlink()  # the digests of its inputs are not known here
    text = (sampled / teacher_samples.FILE).read_text()
    file = tmp_path / teacher_samples.FILE
    file.write_text(text.split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"teacher_samples.jsonl does not hold 8 responses .* for step 1; delete"):
        run_once(config, tmp_path)
    kept = [json.loads(line) for line in text.splitlines()]
    file.write_text("".join(json.dumps(row | {"tokens": [3], "logprobs": [0.0]}) + "\n" for row in kept))
    run_once(config, tmp_path)
    assert read_response_lengths(tmp_path / "sft") == [1.0, 1.0]


def test_a_finished_run_that_is_made_longer_is_the_run_of_all_steps(cache, tmp_path):
    config = make_off_policy_config(cache)
    config.run_arms, config.arms.opcd.off_policy_steps = ("opcd",), 2
    config.optim.schedule, config.train.steps = "constant", 1
    run_once(config, tmp_path / "grown")
    config.train.steps = 3
    whole, grown = (run_once(config, tmp_path / name) for name in ("whole", "grown"))
    assert json.loads(json.dumps(grown)) == json.loads(json.dumps(whole)) and grown["opcd"]["step"] == 3
    files = [(tmp_path / name / teacher_samples.FILE).read_text() for name in ("whole", "grown")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 2 * 8
    written = read_rows(tmp_path / "grown" / "opcd" / "metrics.jsonl")
    assert [row["step"] for row in written if "loss" in row] == [1, 2, 3]


def test_arms_can_be_added_and_those_that_are_not_finished_left_out_when_a_run_goes_on(sampled, cache, tmp_path):
    config, whole = make_off_policy_config(cache), json.loads((sampled / "results.json").read_text())
    for arms in (("opcd",), ("sft", "opcd"), ("opcd",)):
        config.run_arms, config.alarms.stop = arms, ()
        if len(arms) == 1:  # as if an alarm had ended this arm
            (tmp_path / "run" / "sft" / "evaluation.json").unlink(missing_ok=True)
        results = json.loads(json.dumps(run_once(config, tmp_path / "run")))
        assert results.keys() == {"base", *arms}
        assert results["opcd"] == {name: whole["opcd"][name] for name in results["opcd"]}
        assert not [wrong for check in audit.check_folder(tmp_path / "run") for wrong in check.wrong]


def test_a_finished_arm_is_not_left_out_and_no_file_changes(sampled, cache):
    files = {path: path.read_bytes() for path in sampled.rglob("*") if path.is_file()}
    config = make_off_policy_config(cache)
    config.run_arms = ("opcd_anchored", "opcd")
    every = r"\('sft', 'opcd', 'opcd_anchored'\)"
    with pytest.raises(ValueError, match=rf'leaves out sft, which .* has finished: .* --config.run_arms="{every}" '):
        run_once(config, sampled)
    assert files == {path: path.read_bytes() for path in sampled.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The folder of a wider base model."""
    config = make_config(tmp_path_factory.mktemp("larger"))
    config.base.width = 48
    return ensure_base(config)


@pytest.mark.parametrize("rank", [0, 2], ids=["all_weights_and_a_teacher_from_scratch", "adapter_and_a_folder"])
def test_a_larger_teacher_teaches_and_is_evaluated_on_the_same_questions(
    rank, finished, cache, larger, tmp_path, capsys
):
    config = make_config(cache)
    config.lora.rank = rank
    config.run_arms, config.train.steps = ("opcd",), 2
    if rank:
        config.teacher.path = str(larger)
    else:
        config.teacher.offload = True
        config.teacher_base.steps, config.teacher_base.width, config.teacher_base.cache = 2, 48, str(larger.parent)
    results = run_once(config, tmp_path / "run", page=not rank)
    assert list(results) == ["base", "teacher", "opcd"] and f"teacher: {larger}" in capsys.readouterr().out
    # The base is the same as in the run without another teacher; the distribution that it is to learn is not.
    _, alone = finished
    assert results["base"]["view_kl"] == pytest.approx(alone["base"]["view_kl"], rel=1e-5)
    assert results["base"]["distill"] != pytest.approx(alone["base"]["distill"], rel=1e-2)
    items = {model: read_rows(tmp_path / "run" / model / "items.jsonl") for model in ("base", "teacher")}
    assert [item["question"] for item in items["teacher"]] == [item["question"] for item in items["base"]]
    assert rank or "teacher with context" in (tmp_path / "run" / "report.html").read_text()


def test_responses_end_at_the_stop_ids_of_student_or_teacher_and_one_model_is_held_once(cache, larger, tmp_path):
    config, mesh = make_config(cache), sharding.make_mesh(fsdp=2)
    config.teacher.path = str(shutil.copytree(larger, tmp_path / "teacher"))
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    student = open_folder(ensure_base(config), mesh)
    alone = run_inputs.open_teacher(config_lib.experiment(make_config(cache), device_count=2), "", student, mesh, {})
    assert all(folder is student for folder in alone)
    both = run_inputs.open_teacher(config_lib.experiment(config, 2), config.teacher.path, student, mesh, {})
    assert [folder.stop_ids for folder in both] == [(3, 5), (3, 5)] and student.stop_ids == (3,)
    assert [folder.config.width for folder in both] == [32, 48] and both[0].params is student.params


@pytest.mark.parametrize("shortest", [prompts.SHORTEST_PREFIX, 2])  # without, and with a shared prefix
def test_the_previewed_responses_are_those_of_the_first_step(shortest, cache, monkeypatch):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", shortest)
    config = make_config(cache)
    config.train.retention_rows = 4
    experiment = config_lib.experiment(config, jax.device_count())
    monkeypatch.setattr(batch_text, "format_batch", lambda formatter, *shown: shown)
    batch, stop_ids, sampled, other = preview.format_first_batch(experiment, width=100, colour=False)
    assert [arms.source for arms in sampled] == [f"the student for {', '.join(experiment.arms)}"]
    previewed = [sampled[0].rollout, other.rollout]
    assert [len(view.mask_BxP) for view in (batch.bare, batch.context, batch.other)] == [8, 8, 4]
    assert {view.prefix_C for view in (batch.bare, batch.context, batch.other)} == {None}
    begins = [{tuple(ids[:2]) for ids in prompts.unpad(view)} for view in (batch.bare, batch.context)]
    assert begins == [{(2, 5)}, {(2, 4)}]  # the begin token, then the user's or the system's turn
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        world = rules.Rules(experiment.task_config)
        student = open_folder(base_model.find_base_folder(experiment.base, experiment.task, world), mesh)
        sampling = run_inputs.make_sampling_config(experiment.rollout, student)
        loss = experiment.arms["opcd_retained"]
        config = StepConfig(student.config, student.config, sampling, loss, experiment.optim)
        state = init_state(student.params, config, jax.random.key(experiment.seed))
        step = jax.jit(rollout_step, static_argnames="config")
        sampled = jax.device_get(step(state, Frozen(student.params), sharding.put_batch(batch, mesh), config))
    for shown, all_rows in zip(previewed, sampled):
        assert shown.tokens_BxT.shape[0] == preview.ROWS
        np.testing.assert_array_equal(shown.tokens_BxT, all_rows.tokens_BxT[: preview.ROWS])
        np.testing.assert_array_equal(shown.mask_BxT, all_rows.mask_BxT[: preview.ROWS])
    assert stop_ids == (3,)


def test_the_preview_of_an_arm_that_begins_with_the_teachers_samples_shows_them(cache, monkeypatch):
    config = make_config(cache)
    config.run_arms = ("opcd", "off_policy", "sft")
    config.arms.sft.skip_first = 1
    experiment = config_lib.experiment(config, jax.device_count())
    monkeypatch.setattr(batch_text, "format_batch", lambda formatter, *shown: shown)
    batch, stop_ids, sampled, other = preview.format_first_batch(experiment, width=100, colour=False)
    whose = {"the student for opcd": 0, "the teacher for off_policy": 1, "the teacher for sft": 2}
    own, given, skipped = (sampled[place] for place in whose.values())
    assert [arms.source for arms in sampled] == list(whose) and other is None
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        world = rules.Rules(experiment.task_config)
        folder = open_folder(base_model.find_base_folder(experiment.base, experiment.task, world), mesh)
        sampling = run_inputs.make_sampling_config(experiment.teacher.decode, folder)
        key, rows = jax.random.key(experiment.seed), sharding.put_batch(batch, mesh)
        drawn = jax.device_get(teacher_rollout(folder.params, rows, key, 0, folder.config, sampling))
    np.testing.assert_array_equal(given.rollout.mask_BxT, drawn.mask_BxT[: preview.ROWS])
    shown, real = (np.where(r.mask_BxT, r.tokens_BxT, 0) for r in (given.rollout, drawn))
    np.testing.assert_array_equal(shown, real[: preview.ROWS])
    np.testing.assert_array_equal(given.trained_BxT, given.rollout.mask_BxT)
    assert not skipped.trained_BxT[:, 0].any() and skipped.trained_BxT[:, 1].any()
    assert not np.array_equal(own.rollout.tokens_BxT, given.rollout.tokens_BxT)


def test_dump_batch_prints_the_first_batch_and_creates_no_workdir(cache, tmp_path):
    config, changed = tiny.get_config(), make_config(cache)
    ensure_base(changed)
    line = [sys.executable, "-m", "ctxjax.main", "--config=configs/tiny.py", "--dump_batch"]
    line += [f"--workdir={tmp_path / 'run'}"]
    for section in ("base", "rules"):
        settings = changed[section].items()
        line += [f"--config.{section}.{name}={value}" for name, value in settings if value != config[section][name]]
    result = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Shared context prefix" in result.stdout and "\033" not in result.stdout
    assert "from scratch" not in result.stderr, "the cache has a base with these settings"
    assert not (tmp_path / "run").exists()


def test_the_users_own_questions_are_distilled(finished, cache, tmp_path):
    """The held-out distillation KL falls by half on questions from a JSONL file, with a model folder from a path."""
    data = tmp_path / "questions.jsonl"
    rng = np.random.default_rng(0)
    questions = {"#1:" + "".join(rng.choice(list("abcdef"), 4)) for _ in range(100)}
    data.write_text("".join(json.dumps({"q": q, "a": "no. 7"}) + "\n" for q in sorted(questions)))
    config = make_config(cache)
    config.task, config.run_arms, config.model.path = "qa_jsonl", ("opcd",), str(next(cache.glob("rules-base-*")))
    config.qa_jsonl.path, config.qa_jsonl.question, config.qa_jsonl.reference = str(data), "q", "a"
    config.qa_jsonl.context = "a>b;b>c;c>d;d>e;e>f;f>a;"
    config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 16
    config.train.steps, config.optim.lr = 30, 1e-2
    results = run_once(config, tmp_path / "run")
    assert results["opcd"]["distill"] < 0.5 * results["base"]["distill"]
