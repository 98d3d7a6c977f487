"""A whole run on two devices: files, arms, resumption; and the same command on questions of one's own.

A whole run on eight devices is in tiny_safety_test.py."""

import json
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tqdm import tqdm

from configs import tiny
from ctxjax import config as config_lib, sharding
from ctxjax.data import prompts
from ctxjax.data.worlds import rules
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step
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
pytestmark = pytest.mark.usefixtures("two_devices")


def small(cache: Path):
    config = tiny.get_config()
    config.base.cache = str(cache)
    config.base.steps, config.base.warmup_steps, config.base.width, config.base.layers = 2, 1, 32, 1
    config.base.head_dim, config.base.mlp_width, config.base.batch_size = 8, 48, 16
    config.train.steps, config.train.batch_size, config.train.save_every, config.eval.every = 4, 8, 2, 2
    config.optim.warmup_steps = 1
    config.rules.train_questions, config.rules.dev_questions, config.rules.test_questions = 64, 20, 20
    config.eval.batch_size, config.eval.bootstrap = 16, 50
    return config


def start(config, workdir: Path, page: bool = False) -> dict:
    """The results of a run; its page, of which most tests see nothing, only on demand."""
    facts = workdir_lib.collect_facts(config)
    workdir_lib.check_workdir(workdir, facts["config"])
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr(run, "write_report", lambda workdir: None)
        return run.run(config_lib.experiment(config, jax.device_count()), workdir, facts)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, two_devices):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache):
    """(workdir, results) of a run of three arms."""
    workdir = cache / "run"
    return workdir, start(small(cache), workdir, page=True)


def test_results_hold_the_base_and_every_arm(finished):
    workdir, results = finished
    assert list(results) == ["base", *ARMS]
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    wanted = {"acc_x", "acc_xc", "gap", "harm", "benefit", "both_correct", "dlen", "view_kl", "cosine_by_layer", "n"}
    for arm in results.values():
        assert wanted | {"obedience", "acc_empty", "acc_paraphrase", "distill"} <= set(arm)
        assert arm["n"] == 20 and len(arm["cosine_by_layer"]) == 2
    for name in ARMS:
        written = rows(workdir / name / "metrics.jsonl")
        held = {key.removeprefix("alarm/"): 0 for row in written for key in row if key.startswith("alarm/")}
        for key in held:
            held[key] = sum(f"alarm/{key}" in row for row in written)
        assert {key: alarm["rows"] for key, alarm in results[name]["alarms"].items()} == held
        assert results[name]["skipped_steps"] == 0


def test_every_question_is_written_once_for_every_view(finished):
    workdir, _ = finished
    for arm in ("base", *ARMS):
        items = rows(workdir / arm / "items.jsonl")
        pairs = {(item["id"], item["view"]) for item in items}
        assert len(items) == len(pairs) == 20 * 5
        assert {view for _, view in pairs} == {"bare", "context", "empty", "other", "paraphrase"}


def test_metrics_have_each_step_once_and_the_evaluations(finished):
    workdir, _ = finished
    for arm in ARMS:
        written = rows(workdir / arm / "metrics.jsonl")
        assert [row["step"] for row in written if "loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in written if "dev/acc_x" in row] == [0, 2, 4]
        assert max(row.get("logprob_gap_max", 0) for row in written) < 1e-4
        assert list((workdir / arm / "events").glob("events.out.tfevents.*"))


def test_only_the_arms_that_need_a_term_pay_for_it(finished):
    workdir, _ = finished
    terms = {arm: set(rows(workdir / arm / "metrics.jsonl")[1]) & {"distill", "anchor", "retain"} for arm in ARMS}
    assert terms["opcd"] == {"distill"}
    assert terms["opcd_anchored"] == {"distill", "anchor"}
    assert terms["opcd_retained"] == {"distill", "anchor", "retain"}


def test_an_anchor_that_waits_is_paid_for_in_its_steps_alone_and_weighs_for_the_others(finished, cache, tmp_path):
    config = small(cache)
    config.run_arms, config.loss.anchor_every = ("opcd_anchored",), 2
    start(config, tmp_path / "run")
    plain, always = (rows(finished[0] / arm / "metrics.jsonl") for arm in ("opcd", "opcd_anchored"))
    lazy = [row for row in rows(tmp_path / "run" / "opcd_anchored" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in lazy if "anchor" in row] == [2, 4]
    first = {name: value for name, value in lazy[0].items() if name not in ("time", "tokens_per_second")}
    plain = next(row for row in plain if "loss" in row)
    assert first == {name: plain[name] for name in first} and any("anchor" in row for row in always)
    beta = config.arms.opcd_anchored.beta
    np.testing.assert_allclose(lazy[1]["loss"], lazy[1]["distill"] + 2 * beta * lazy[1]["anchor"], rtol=1e-6)


def test_the_report_stands_beside_the_results(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert "opcd_anchored" in page and "http" not in page.replace("http://www.w3.org", "")


def stopped(config, workdir: Path) -> Path:
    """The folder of a run that ended in its third step, after the checkpoint of the second."""
    original = arm_lib.Writer.step

    def stop_after_two(self, step, metrics):
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, metrics)

    arm_lib.Writer.step = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            start(config, workdir)
    finally:
        arm_lib.Writer.step = original
    return workdir


@pytest.fixture(scope="module")
def interrupted(finished, cache):
    """(configuration, workdir) of such a run of all weights, to be copied by those who go on with it."""
    config = small(cache)
    config.run_arms = ("opcd_retained",)
    return config, stopped(config, cache / "stopped")


@pytest.mark.parametrize("rank", [0, 2], ids=["all_weights", "adapter"])
def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_alike(rank, finished, cache, request, tmp_path):
    arm = "opcd_retained"
    if rank:
        config = small(cache)
        config.run_arms, config.lora.rank = (arm,), rank
        workdir, again = cache / "adapter", stopped(config, tmp_path / "run")
        uninterrupted = start(config, workdir)
    else:
        (workdir, uninterrupted), (config, before) = finished, request.getfixturevalue("interrupted")
        again = shutil.copytree(before, tmp_path / "run")
    results = start(config, again)
    before = [row["loss"] for row in rows(workdir / arm / "metrics.jsonl") if "loss" in row]
    after = [row["loss"] for row in rows(again / arm / "metrics.jsonl") if "loss" in row]
    assert len(before) == 4 and after == before
    assert results[arm]["view_kl"] == uninterrupted[arm]["view_kl"]


def last_params(workdir: Path, arm: str, cache: Path) -> dict[str, np.ndarray]:
    """What an arm's last checkpoint holds of the parameters, by name, on the host."""
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        folder = open_folder(next(cache.glob("rules-base-*")), mesh)
        params = read_params(workdir / arm / "checkpoints", 4, folder.params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1)], ids=str)
def test_a_run_interrupted_on_one_mesh_goes_on_on_another_to_the_same_parameters(
    shape, finished, interrupted, cache, only, monkeypatch, tmp_path
):
    """From two shards of every matrix to one device, and to four shards in two copies."""
    config, before = interrupted
    config, again = config.copy_and_resolve_references(), shutil.copytree(before, tmp_path / "run")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    only(int(np.prod(shape)), monkeypatch)
    stored = json.loads((finished[0] / "opcd_retained" / "evaluation.json").read_text())["of"]
    evaluation = Evaluation.load(finished[0] / "opcd_retained", stored)
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: evaluation)  # what is looked at is the training
    start(config, again)
    monkeypatch.undo()
    expected, found = (last_params(workdir, "opcd_retained", cache) for workdir in (finished[0], again))
    first = last_params(finished[0], "opcd", cache)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(first[name] - expected[name]).max() for name in expected) > 1e-4
    losses = [
        [row["loss"] for row in rows(workdir / "opcd_retained" / "metrics.jsonl") if "loss" in row]
        for workdir in (finished[0], again)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_finished_run_is_not_evaluated_again_and_says_the_same(finished, cache, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")

    def fails(self, params):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Evaluator, "__call__", fails)
    (workdir / "results.json").unlink()
    start(small(cache), workdir)
    assert (workdir / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()
    stored = json.loads((workdir / "opcd" / "evaluation.json").read_text())
    stored["of"]["step"] = 2  # of another step
    (workdir / "opcd" / "evaluation.json").write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="evaluated again"):
        start(small(cache), workdir)


def test_the_checkpoint_that_is_best_on_dev_is_kept_and_measured_beside_the_last(finished, cache, tmp_path):
    written = rows(finished[0] / "opcd" / "metrics.jsonl")
    first, last = (row["dev/distill"] for row in written if row.get("dev/distill") is not None and row["step"])
    config = small(cache)
    config.run_arms, config.eval.select = ("opcd",), "distill" if first > last else "-distill"
    config.train.save_every, config.train.keep = 4, 1
    results = start(config, tmp_path / "run", page=True)
    assert saved_steps(tmp_path / "run" / "opcd" / "checkpoints") == [2, 4]
    assert results["opcd"]["step"] == 4 and results["opcd"]["selected"]["step"] == 2
    assert results["opcd"]["selected"]["view_kl"] != results["opcd"]["view_kl"]
    assert "opcd, step 2, best on dev" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("select", ["accuracy", "--harm", "n"])
def test_a_select_that_is_no_metric_is_refused_before_anything_is_opened(select, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_inputs", None)
    config = small(cache)
    config.eval.select = select
    with pytest.raises(ValueError, match=f"eval.select = '{select}' is not a metric; choose from .*, -harm, "):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_entry_of_the_table_is_a_metric_that_selects_and_is_reported(cache, tmp_path, monkeypatch, capsys):
    """From the responses to results.json, metrics.jsonl, the console and the page; the first arm is not opcd."""
    long = metrics.Metric(
        "long", "long", "share", "Responses of more than 10 tokens.", ("bare",),
        lambda bare: statistics.rate(bare.length > 10), better="lower",
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, long))
    config = small(cache)
    config.run_arms, config.eval.select = ("opcd_anchored", "opcd"), "-long"
    results = start(config, tmp_path / "run", page=True)
    for arm, row in results.items():
        lengths = [item["length"] for item in rows(tmp_path / "run" / arm / "items.jsonl") if item["view"] == "bare"]
        assert row["long"] == np.mean(np.array(lengths) > 10)
    assert "harm_minus_opcd_anchored" in results["opcd"]
    written = rows(tmp_path / "run" / "opcd" / "metrics.jsonl")
    assert [row["step"] for row in written if "dev/long" in row] == [0, 2, 4]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| arm ")]
    assert len(table) == 1 and table[0].endswith(" long % |")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>long %</th>" in page
    assert "<dt>long</dt><dd>Responses of more than 10 tokens. Lower is better.</dd>" in page


def test_what_is_held_is_printed_once(cache, capsys):
    config = small(cache)
    config.arms.twin = config.arms.opcd_retained.copy_and_resolve_references()
    config.run_arms, config.lora.rank, config.eval.every = ("opcd_retained", "twin"), 2, 0
    start(config, cache / "sizes")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters: ")]
    assert len(lines) == 1
    # Rank 2 on matrices of 32 x 32, 32 x 16 (twice), 32 x 32 and 32 x 48 (three times); Adam keeps two moments.
    assert lines[0].startswith("parameters: 928 trained (3.71 kB), ") and lines[0].endswith("optimiser: 7.43 kB")


def test_a_run_whose_prompts_share_a_prefix_comes_to_the_same_numbers(finished, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", 2)
    config = small(cache)
    config.run_arms = ("opcd_retained",)
    start(config, tmp_path / "run")
    shared, expected = (rows(folder / "opcd_retained" / "metrics.jsonl") for folder in (tmp_path / "run", finished[0]))
    for ours, theirs in zip(shared, expected, strict=True):
        for name in {"loss", "distill", "retain", "dev/view_kl", "dev/distill"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_steps_without_a_finite_loss_end_the_run_with_their_rows_and_leave_what_was_good(
    cache, tmp_path, monkeypatch, capsys
):
    def broken(*arguments):
        state = init_state(*arguments)
        return state.replace(params=state.params | {"final_norm": state.params["final_norm"].at[0].set(np.nan)})

    monkeypatch.setattr(arm_lib, "init_state", broken)
    config = small(cache)
    config.run_arms, config.train.save_every, config.eval.every = ("opcd_retained",), 1, 0
    bars = set(tqdm._instances)
    with pytest.raises(StopRun, match="opcd_retained, step 3: the loss .*loss = nan.*alarms.patience = 3") as stop:
        start(config, tmp_path / "run")
    folder = tmp_path / "run" / "opcd_retained"
    assert set(tqdm._instances) <= bars, "a bar is open still, and what is said next would stand behind it"
    assert capsys.readouterr().err.count("warning: opcd_retained, step 1: the loss or its gradient") == 1
    written = rows(folder / "metrics.jsonl")[1:]
    assert [(row["step"], row["skipped"], row["alarm/not_finite"]) for row in written] == [(n, 1, 1) for n in (1, 2, 3)]
    offenders = rows(folder / "not_finite_step_3.jsonl")
    assert str(folder / "not_finite_step_3.jsonl") in str(stop.value)
    assert [row["view"] for row in offenders] == ["bare"] * 8 + ["other"] * 8
    assert all(row["loss"] is None and row["prompt"] and row["tokens"] for row in offenders)
    assert saved_steps(folder / "checkpoints") == [1, 2]


def test_another_configuration_in_the_same_workdir_is_refused_and_nothing_changes(finished, cache):
    workdir, _ = finished
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = small(cache)
    config.optim.lr = 1e-2
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*optim.lr: 0.001 -> 0.01"):
        start(config, workdir)
    assert files == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_base_is_trained_once_and_is_an_ordinary_folder(finished, cache):
    folders = list(cache.glob("rules-base-*"))
    assert len(folders) == 1
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert expected <= {path.name for path in folders[0].iterdir()}


def trained(config) -> Path:
    """The folder of a configuration's base, trained where it is not in the cache."""
    experiment = config_lib.experiment(config, jax.device_count())
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        return base_model.ensure_base(experiment.base, experiment.task, rules.Rules(experiment.task_config), mesh)


def taught_by_samples(cache: Path):
    """Two arms that learn from the teacher's samples, one of them in its first step alone."""
    config = small(cache)
    config.run_arms, config.train.steps, config.train.save_every, config.eval.every = ("sft", "opcd"), 2, 2, 0
    config.arms.opcd.off_policy_steps = 1
    config.teacher.temperature = 0.5
    return config


@pytest.fixture(scope="module")
def sampled(cache):
    """The workdir of that run."""
    start(taught_by_samples(cache), cache / "sampled")
    return cache / "sampled"


def response_lengths(arm: Path) -> list[float]:
    return [row["response_length"] for row in rows(arm / "metrics.jsonl") if "response_length" in row]


def test_the_teachers_samples_are_kept_with_their_ids_and_shared_by_the_arms(sampled):
    kept = rows(sampled / teacher_samples.FILE)
    assert [row["step"] for row in kept] == [1] * 8 + [2] * 8
    assert len({(row["step"], row["id"]) for row in kept}) == 16 and all(row["question"] == row["id"] for row in kept)
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 19 for row in kept)
    length = [np.mean([len(row["tokens"]) for row in kept if row["step"] == step]) for step in (1, 2)]
    of_arm = {arm: response_lengths(sampled / arm) for arm in ("sft", "opcd")}
    assert of_arm["sft"] == pytest.approx(length)
    assert of_arm["opcd"][0] == pytest.approx(length[0]) and of_arm["opcd"][1] != pytest.approx(length[1])


def test_a_run_taken_up_again_learns_from_the_samples_that_it_kept(sampled, cache, tmp_path):
    config = taught_by_samples(cache)
    config.run_arms = ("sft",)
    workdir_lib.claim(tmp_path, workdir_lib.collect_facts(config), {})
    (tmp_path / "run.json").unlink()  # of inputs that are not known here
    text = (sampled / teacher_samples.FILE).read_text()
    file = tmp_path / teacher_samples.FILE
    file.write_text(text.split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"teacher_samples.jsonl does not hold 8 responses .* for step 1; delete"):
        start(config, tmp_path)
    kept = [json.loads(line) for line in text.splitlines()]
    file.write_text("".join(json.dumps(row | {"tokens": [3], "logprobs": [0.0]}) + "\n" for row in kept))
    start(config, tmp_path)
    assert response_lengths(tmp_path / "sft") == [1.0, 1.0]


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The folder of a wider base."""
    config = small(tmp_path_factory.mktemp("larger"))
    config.base.width = 48
    return trained(config)


@pytest.mark.parametrize("rank", [0, 2], ids=["all_weights_and_a_teacher_from_scratch", "adapter_and_a_folder"])
def test_a_larger_teacher_teaches_and_is_measured_with_the_same_questions(
    rank, finished, cache, larger, tmp_path, capsys
):
    config = small(cache)
    config.lora.rank = rank
    config.run_arms, config.train.steps = ("opcd",), 2
    if rank:
        config.teacher.path = str(larger)
    else:
        config.teacher.offload = True
        config.teacher_base.steps, config.teacher_base.width, config.teacher_base.cache = 2, 48, str(larger.parent)
    results = start(config, tmp_path / "run", page=not rank)
    assert list(results) == ["base", "teacher", "opcd"] and f"teacher: {larger}" in capsys.readouterr().out
    # The base is the same as in the run that taught itself; what it is to learn is not.
    _, alone = finished
    assert results["base"]["view_kl"] == pytest.approx(alone["base"]["view_kl"], rel=1e-5)
    assert results["base"]["distill"] != pytest.approx(alone["base"]["distill"], rel=1e-2)
    items = {model: rows(tmp_path / "run" / model / "items.jsonl") for model in ("base", "teacher")}
    assert [item["question"] for item in items["teacher"]] == [item["question"] for item in items["base"]]
    assert rank or "teacher with context" in (tmp_path / "run" / "report.html").read_text()


def test_student_and_teacher_end_at_the_ends_of_either_and_the_own_teacher_is_one_copy(cache, larger, tmp_path):
    config, mesh = small(cache), sharding.make_mesh(fsdp=2)
    config.teacher.path = str(shutil.copytree(larger, tmp_path / "teacher"))
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    student = open_folder(trained(config), mesh)
    alone = run_inputs.open_teacher(config_lib.experiment(small(cache), device_count=2), "", student, mesh, {})
    assert all(folder is student for folder in alone)
    both = run_inputs.open_teacher(config_lib.experiment(config, 2), config.teacher.path, student, mesh, {})
    assert [folder.stop_ids for folder in both] == [(3, 5), (3, 5)] and student.stop_ids == (3,)
    assert [folder.config.width for folder in both] == [32, 48] and both[0].params is student.params


@pytest.mark.parametrize("shortest", [prompts.SHORTEST_PREFIX, 2])  # read in every row, and shared
def test_the_previewed_responses_are_those_of_the_first_step(shortest, cache, monkeypatch):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", shortest)
    experiment = config_lib.experiment(small(cache), jax.device_count())
    monkeypatch.setattr(batch_text, "first_batch", lambda pen, *shown: shown)
    batch, stop_ids, *previewed = preview.first_batch(experiment, width=100, colour=False)
    assert {view.prefix_C for view in (batch.bare, batch.context, batch.other)} == {None}
    begins = [{tuple(ids[:2]) for ids in prompts.unpad(view)} for view in (batch.bare, batch.context)]
    assert begins == [{(2, 5)}, {(2, 4)}]  # the begin token, then the user's turn, or the system's
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=2)):
        world = rules.Rules(experiment.task_config)
        student = open_folder(base_model.find_base_folder(experiment.base, experiment.task, world), mesh)
        sampling = run_inputs.make_sampling_config(experiment.rollout, student)
        loss = experiment.arms["opcd_retained"]
        config = StepConfig(student.config, student.config, sampling, loss, experiment.optim)
        state = init_state(student.params, config, jax.random.key(experiment.seed))
        step = jax.jit(rollout_step, static_argnames="config")
        sampled = jax.device_get(step(state, Frozen(student.params), sharding.put_batch(batch, mesh), config))
    for few, all_rows in zip(previewed, sampled):
        assert few.tokens_BxT.shape[0] == preview.ROWS
        np.testing.assert_array_equal(few.tokens_BxT, all_rows.tokens_BxT[: preview.ROWS])
        np.testing.assert_array_equal(few.mask_BxT, all_rows.mask_BxT[: preview.ROWS])
    assert stop_ids == (3,)


def test_the_command_shows_the_first_batch_and_touches_no_workdir(cache, tmp_path):
    config, changed = tiny.get_config(), small(cache)
    trained(changed)
    line = [sys.executable, "-m", "ctxjax.main", "--config=configs/tiny.py", "--dump_batch"]
    line += [f"--workdir={tmp_path / 'run'}"]
    for section in ("base", "rules"):
        settings = changed[section].items()
        line += [f"--config.{section}.{name}={value}" for name, value in settings if value != config[section][name]]
    result = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Shared context prefix" in result.stdout and "\033" not in result.stdout
    assert "from scratch" not in result.stderr, "there is a base of these settings"
    assert not (tmp_path / "run").exists()


def test_questions_of_ones_own_are_distilled(finished, cache, tmp_path):
    """Held-out distillation KL falls by half on a JSONL file, with a folder that is not of our making."""
    data = tmp_path / "questions.jsonl"
    rng = np.random.default_rng(0)
    questions = {"#1:" + "".join(rng.choice(list("abcdef"), 4)) for _ in range(100)}
    data.write_text("".join(json.dumps({"q": q, "a": "no. 7"}) + "\n" for q in sorted(questions)))
    config = small(cache)
    config.task, config.run_arms, config.model.path = "qa_jsonl", ("opcd",), str(next(cache.glob("rules-base-*")))
    config.qa_jsonl.path, config.qa_jsonl.question, config.qa_jsonl.reference = str(data), "q", "a"
    config.qa_jsonl.context = "a>b;b>c;c>d;d>e;e>f;f>a;"
    config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 16
    config.train.steps, config.optim.lr = 30, 1e-2
    results = start(config, tmp_path / "run")
    assert results["opcd"]["distill"] < 0.5 * results["base"]["distill"]
