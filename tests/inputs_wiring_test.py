"""What reaches the stages of a run: whole texts, the settings of the prompts in every view, and the fields that say how
models are opened, decoded, trained and saved. Stages are replaced by recorders, so almost nothing is compiled."""

import collections
import copy
import dataclasses
import json
from pathlib import Path
import string
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reference
from safetensors.numpy import load_file

from ctxjax import config as config_lib, evaluate, rng
from ctxjax.configs import base
from ctxjax.data import pipeline, prompts
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.evaluation import metrics as metrics_lib, views
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.host import checksum, workdir as workdir_lib
from ctxjax.inputs import base_model, data_record, decoding, run_inputs, teacher_samples
from ctxjax.report.formatting import shorten
from ctxjax.sharding import make_mesh
from ctxjax.training import arm as arm_lib, run as run_lib
from ctxjax.types import Rollout

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}({{ date_string }},{{ enable_thinking }}){% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}<|assistant|>"
)
LONG = "".join(chr(97 + place * place % 26) for place in range(2600)) + " The end."
STUDENT = {"the": np.arange(3, dtype=np.float32)}  # parameters that no recorder reads
OTHERS = [f"Other context {n}. {LONG[: 2200 * (n % 3 == 0)]}the end" for n in range(9)]


@pytest.fixture(scope="module", autouse=True)
def one_device(only):
    with pytest.MonkeyPatch.context() as patch:
        only(1, patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Questions of 8 and of about 650 letters, contexts of more than 2,000, and a model whose tokens are letters."""
    path = tmp_path_factory.mktemp("inputs")
    tokenizer = word_tokenizer.build([*string.printable[:95], "\n"], r"[\s\S]")
    tokenizer.chat_template = TEMPLATE
    for name, seed, stop_ids in (("model", 0, [3]), ("teacher", 1, [3, 9])):
        reference.write_folder(path / name, tokenizer, seed, stop_ids, len(tokenizer), 16, 2, 16)
        fields = json.loads((path / name / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 8192}))
    rows = [{"question": f"q{n:02} {LONG[n : n + 650 * (n % 2)]}?", "answer": str(n)} for n in range(40)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "others.jsonl").write_text("".join(json.dumps(text) + "\n" for text in OTHERS))
    (path / "context.txt").write_text(LONG)
    return path


def settings(folder: Path, **changes):
    config = base.get_config()
    config.task, config.model.path, config.compile_cache = "qa_jsonl", str(folder / "model"), ""
    config.qa_jsonl.path, config.qa_jsonl.context_file = str(folder / "rows.jsonl"), str(folder / "context.txt")
    config.qa_jsonl.other_contexts_file = str(folder / "others.jsonl")
    config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 8
    config.rollout.max_tokens, config.train.batch_size, config.eval.batch_size = 5, 8, 4
    config.run_arms = ("opcd_retained",)
    config.update_from_flattened_dict(changes)
    return config


def rendered(question: str, context: str | None, config) -> str:
    """The whole prompt, as TEMPLATE writes it."""
    own = config.prompt
    head = f"<|begin|>({own.date},{'' if own.thinking is None else own.thinking})"
    if context and own.placement == "prefix":
        return f"<|begin|>{context}{head.removeprefix('<|begin|>')}<|user|>{question}<|end|><|assistant|>"
    system = f"<|system|>{context}<|end|>" if context is not None and own.placement == "system" else ""
    before = f"{context}\n\n" if context and own.placement == "user" else ""
    return f"{head}{system}<|user|>{before}{question}<|end|><|assistant|>"


def texts(tokenizer, given) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in prompts.unpad(given)]


def record_stages(patch) -> list[tuple]:
    """Replace what an evaluation compiles; return the arguments of its calls."""
    calls = []

    def decode(params, model, sampling, given, key, batch, mesh, what):
        calls.append(("decode", params, sampling, given, jax.random.key_data(key).tolist(), batch))
        rows = len(given.mask_BxP) * sampling.samples
        tokens = np.tile(np.array([[20, 21, 3]], np.int32), (rows, 1))
        return Rollout(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.float32))

    def compare(params, model, bare, context, control, rollout, batch, mesh, what):
        calls.append(("compare", params, bare, context, control, rollout, batch))
        cosines = dict.fromkeys(("cosine", "control", "centred"), np.zeros((3, *rollout.mask_BxT.shape)))
        return np.zeros(rollout.mask_BxT.shape), cosines, dict.fromkeys(("context", "control"), np.zeros(3))

    def distillation(params, teacher, model, teacher_model, loss, bare, context, rollout, batch, mesh, what):
        calls.append(("distill", params, teacher, loss, bare, context, rollout))
        return 0.5

    patch.setattr(decoding, "decode", decode)
    patch.setattr(views, "compare", compare)
    patch.setattr(views, "distillation_kl", distillation)
    return calls


PROMPTS = [
    {}, {"prompt.placement": "user", "prompt.date": "02 Mar 2021"},
    {"prompt.placement": "prefix", "prompt.thinking": True}, {"prompt.thinking": False},
]  # fmt: skip


@pytest.mark.parametrize("changes", PROMPTS, ids=str)
def test_every_prompt_of_training_and_evaluation_is_whole_and_written_as_configured(changes, folder, monkeypatch, mesh):
    config = settings(folder, **changes)
    experiment = config_lib.experiment(config, 1)
    task, student, teacher, rows, retention = run_inputs.open_inputs(experiment, mesh, {})
    by_question = {row.question: row for split in ("train", "dev", "test") for row in task.rows(split)}
    assert {len(question) > 600 for question in by_question} == {True, False}

    train = {row.question for row in task.rows("train")}
    source = {"seed": config.seed, "batch_size": 8, "retention_rows": 8, "pad_id": student.pad_id}
    batches = pipeline.training_batches(rows, retention, **source)
    seen, allowed = collections.Counter(), {rendered(q, c, config) for q in train for c in task.other_contexts("train")}
    for _ in range(6):
        batch = next(batches)
        bare, context, other = (texts(student.tokenizer, view) for view in (batch.bare, batch.context, batch.other))
        asked = {rendered(question, None, config): question for question in train}
        assert context == [rendered(asked[text], LONG, config) for text in bare]
        assert set(other) <= allowed
        seen.update(len(text) > 2000 + 600 for text in other)
    assert set(seen) == {True, False}

    calls = record_stages(monkeypatch)
    (evaluator,) = Evaluator.of_splits(experiment, task, ("test",), student, teacher, mesh)
    found = evaluator(STUDENT)
    asked = [row.question for row in task.rows("test")]
    assert {len(question) > 600 for question in asked} == {True, False}
    others = task.other_contexts("test")
    contexts = {"bare": [None], "context": [LONG], "empty": [""], "other": others}
    given = [texts(student.tokenizer, call[3]) for call in calls if call[0] == "decode"]
    assert len(others) > 1
    for view, own in zip(given[:4], contexts.values(), strict=True):
        assert view == [rendered(question, own[row % len(own)], config) for row, question in enumerate(asked)]
    assert given[4] == given[0]  # the responses of the held-out distillation loss
    assert found.metrics["distill"] == 0.5 and found.metrics["n"] == len(asked)


def test_an_evaluation_decodes_as_eval_says_and_its_distillation_loss_as_the_rollout_says(folder, monkeypatch, mesh):
    changes = {"eval.temperature": 0.3, "eval.top_k": 7, "eval.top_p": 0.6, "eval.samples": 2, "eval.batch_size": 3}
    changes |= {"eval.bootstrap": 77, "seed": 6}
    changes |= {"rollout.temperature": 0.8, "rollout.top_k": 11, "rollout.top_p": 0.9, "rollout.weights": "stored"}
    config = settings(folder, **changes, **{"teacher.path": str(folder / "teacher")})
    experiment = config_lib.experiment(config, 1)
    task, student, teacher, *_ = run_inputs.open_inputs(experiment, mesh, {})
    calls = record_stages(monkeypatch)
    (evaluator,) = Evaluator.of_splits(experiment, task, ("dev",), student, teacher, mesh)
    computed = []
    monkeypatch.setattr(metrics_lib, "compute_metrics", lambda *given: computed.append(given) or {"n": 8})
    found = evaluator(STUDENT)
    assert found.weights == checksum.compute_checksums(STUDENT)
    ((measured, resamples),) = computed
    assert resamples == 77 and found.metrics == {"n": 8}
    assert measured.keys() == {"bare", "context", "empty", "other", "ignored", "comparison", "distill"}
    assert all(measured[view] is found.outcomes[view] for view in found.outcomes)
    decodes = [call for call in calls if call[0] == "decode"]
    settings_of = [(s.temperature, s.top_k, s.top_p, s.samples, s.max_tokens) for _, _, s, *_ in decodes]
    assert settings_of == [(0.3, 7, 0.6, 2, 5)] * 4 + [(0.8, 11, 0.9, 1, 5)]
    assert all(s.eos_ids == (3, 9) and s.weights == "stored" for _, _, s, *_ in decodes)
    keys = [rng.key_for(jax.random.key(6), view, "evaluation") for view in (0, 1, 2, 3, 0)]
    assert [call[4] for call in decodes] == [jax.random.key_data(key).tolist() for key in keys]
    assert len({str(call[4]) for call in decodes[:4]}) == 4, "samples of two views share their random numbers"
    assert {made["seed"] for made in found.decoding.values()} == {6}
    assert all(call[1] is STUDENT for call in calls)
    (compared,), (distilled,) = ([c for c in calls if c[0] == kind] for kind in ("compare", "distill"))
    for found, view in zip(compared[2:5], (0, 1, 3)):  # the control is the view under another context
        assert found is decodes[view][3]
    assert len(compared[5].mask_BxT) == len(decodes[0][3].mask_BxP)  # the first sample of each question
    assert distilled[2] is teacher.params and distilled[3].temperature == 0.8
    assert distilled[4] is decodes[0][3] and distilled[5] is decodes[1][3]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_command_evaluates_the_split_that_it_is_given(split, folder, monkeypatch):
    calls, config = record_stages(monkeypatch), settings(folder)
    found, facts, data = evaluate.evaluate(config, split)
    task = run_inputs.TASKS["qa_jsonl"][1](config_lib.experiment(config, 1).task_config)
    assert [item["id"] for item in found.items if item["view"] == "bare"] == [row.id for row in task.rows(split)]
    assert {item["context"] for item in found.items if item["view"] == "other"} <= set(task.other_contexts(split))
    assert facts["split"] == split and data.text == data_record.DataRecord(task).text
    (params,) = {id(call[1]): call[1] for call in calls}.values()
    assert found.weights == checksum.compute_checksums(params) and len(found.weights) > 1


def test_models_are_opened_as_configured(folder, monkeypatch, mesh):
    seen, original = {}, run_inputs.open_folder

    def record(path, mesh, dtype, param_dtype, remat="none", attention="auto", student=None):
        seen[Path(path).name] = (dtype, param_dtype, remat, attention, student is not None)
        return original(path, mesh, dtype, param_dtype, remat, attention, student)

    monkeypatch.setattr(run_inputs, "open_folder", record)
    changes = {"model.dtype": "bfloat16", "model.remat": "dots", "teacher.param_dtype": "bfloat16"}
    changes |= {"teacher.path": str(folder / "teacher"), "lora.rank": 2, "model.param_dtype": "float32"}
    changes |= {"model.attention": "reference"}
    config = config_lib.experiment(settings(folder, **changes), 1)
    opened = run_inputs.open_inputs(config, mesh, {})
    assert seen == {
        "model": ("bfloat16", "float32", "dots", "reference", False),
        "teacher": ("bfloat16", "bfloat16", "none", "reference", True),
    }
    assert opened.student.config.dtype == "bfloat16" and opened.student.config.remat == "dots"
    read = reference.read_folder(folder / "teacher")["embedding"]
    np.testing.assert_allclose(np.float32(opened.teacher.params["embedding"]), read, rtol=1e-2)
    assert opened.teacher.params["embedding"].dtype == "bfloat16" and opened.student.stop_ids == (3, 9)
    count = sum(array.size for array in load_file(folder / "teacher" / "model.safetensors").values())
    each, whole, half = (shorten(number).strip() for number in (count, 4 * count, 2 * count))
    frozen = f"{each} frozen in the student's base ({whole}B), {each} frozen in the teacher ({half}B); optimiser: "
    assert frozen in run_lib._describe_sizes(config, opened.student, opened.teacher, mesh)


class Recorded(Exception):
    """Ends a stage once what it was given is known."""


def make_arm(folder, monkeypatch, tmp_path, mesh, **changes):
    """(an arm of a run whose first arm is another one, what its checkpoints and its writer were given)."""
    changes = {"run_arms": ("sft", "opcd_retained"), "arms.opcd_retained.mu": 0.25} | changes
    config = config_lib.experiment(settings(folder, **changes), 1)
    inputs = run_inputs.open_inputs(config, mesh, {})
    found = SimpleNamespace(config=config, inputs=inputs)
    monkeypatch.setattr(arm_lib, "Checkpoints", lambda *given: found.__setattr__("checkpoints", given))
    monkeypatch.setattr(arm_lib.Arm, "_restore_or_init", lambda arm, checkpoints: ("state", 0))

    def writer(*given):
        found.writer = given
        raise Recorded

    monkeypatch.setattr(arm_lib, "Writer", writer)
    fed_rows = SimpleNamespace(describe=lambda step, drawn: (step, drawn))
    record = {"config": {}, "manifest": {"started": "today", "earlier_starts": []}}
    shared = arm_lib.Shared(config, inputs, "prefix", {}, mesh, record, fed_rows)
    found.arm = arm_lib.Arm(shared, "opcd_retained", tmp_path)
    with pytest.raises(Recorded):
        found.arm.train(None, None, 0.0, {})
    return found


CHANGED = {
    "rollout.temperature": 0.6, "rollout.top_k": 4, "rollout.top_p": 0.7, "rollout.weights": "stored",
    "loss.ema_decay": 0.5, "loss.clip": 2.0, "loss.chunk": 3, "optim.lr": 3e-4, "optim.weight_decay": 0.2,
    "optim.clip": 0.3, "optim.b1": 0.7, "optim.b2": 0.8, "optim.warmup_steps": 4, "optim.schedule": "cosine",
    "train.steps": 12, "train.micro_batches": 2, "train.keep": 5, "train.log_every": 3, "train.save_every": 4,
    "eval.every": 5, "alarms.patience": 7, "alarms.truncated": 0.9, "seed": 9, "eval.select": "-distill",
}  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_an_arm_trains_saves_and_watches_as_configured(rank, folder, monkeypatch, tmp_path, mesh):
    changes = CHANGED | {"lora.rank": rank, "lora.alpha": 5.0, "teacher.path": str(folder / "teacher") if rank else ""}
    made = make_arm(folder, monkeypatch, tmp_path, mesh, **changes)
    step, sampling, frozen = made.arm._step_config, made.arm._step_config.sampling, made.arm._frozen
    assert dataclasses.asdict(sampling) == {
        "max_tokens": 5, "eos_ids": (3, 9) if rank else (3,), "pad_id": 0, "temperature": 0.6, "top_k": 4, "top_p": 0.7,
        "weights": "stored", "samples": 1,
    }  # fmt: skip
    loss = step.loss
    assert (loss.beta, loss.mu, loss.temperature, loss.ema_decay, loss.clip, loss.chunk) == (
        0.5,
        0.25,
        0.6,
        0.5,
        2.0,
        3,
    )
    assert dataclasses.asdict(step.optim) == {
        "lr": 3e-4, "steps": 12, "schedule": "cosine", "warmup_steps": 4, "b1": 0.7, "b2": 0.8, "weight_decay": 0.2,
        "clip": 0.3,
    }  # fmt: skip
    assert step.micro_batches == 2 and (step.lora is None) == (rank == 0)
    if rank:
        assert (step.lora.rank, step.lora.alpha) == (2, 5.0)
    assert frozen.teacher is made.inputs.teacher.params and frozen.teacher_prefix == "prefix"
    assert (made.inputs.teacher is made.inputs.student) == (rank == 0)
    assert frozen.base is (made.inputs.student.params if rank else None)
    assert step.model == made.inputs.student.config and step.teacher_model == made.inputs.teacher.config
    folder_of_checkpoints, keep, scores = made.checkpoints
    assert (folder_of_checkpoints, keep) == (tmp_path / "checkpoints", 5)
    scores[5], scores[10] = 0.2, 0.1
    due = [taken for taken in range(1, 13) if made.arm._is_save_due(taken)]
    assert due == [4, 5, 8, 12] and [t for t in range(13) if made.arm._is_evaluation_due(t)] == [5, 10]
    made.arm._note(10, {"dev/distill": 0.25, "dev/acc_x": 1.0})
    made.arm._note(0, {"dev/distill": 0.01, "dev/acc_x": 1.0})  # the base's
    assert scores == {5: 0.2, 10: -0.25}
    assert made.writer[:5] == (tmp_path, "opcd_retained", 12, 0, 3) and made.writer[5] is made.arm.alarms
    assert made.arm.alarms._config.patience == 7 and made.arm.alarms._config.truncated == 0.9


def test_a_resumed_arm_remembers_every_evaluation_before_its_checkpoint(folder, monkeypatch, tmp_path, mesh):
    made = make_arm(folder, monkeypatch, tmp_path, mesh, **{"eval.every": 5, "eval.select": "acc_x"})
    rows = [{"step": 0, "dev/acc_x": 0.1, "dev/acc_xc": 0.95}, {"step": 4, "loss": 1.0}]
    rows += [{"step": 5, "loss": 0.5}, {"step": 5, "dev/acc_x": 0.7, "dev/acc_xc": 0.6}]
    rows += [{"step": 10, "dev/acc_x": 0.4, "dev/acc_xc": 0.9}, {"step": 11, "loss": 0.3}]
    monkeypatch.setattr(arm_lib, "Writer", lambda *_: SimpleNamespace(kept=rows))
    monkeypatch.setattr(arm_lib.Arm, "_restore_or_init", lambda *_: ("state", 11))

    def fed_rows(*given):
        raise Recorded(given)

    monkeypatch.setattr(arm_lib, "StepRows", fed_rows)  # the next that is opened
    with pytest.raises(Recorded) as opened:
        made.arm.train(None, None, 0.0, {})
    assert opened.value.args == ((tmp_path / data_record.ROWS_FILE, 11),)
    assert made.checkpoints[2] == made.arm._scores == {5: 0.7, 10: 0.4}
    assert made.arm.accuracies_with_context == (0.6, 0.9)
    monkeypatch.setattr(arm_lib, "saved_steps", lambda folder: [5, 8, 10])
    assert made.arm.selected_step == 5 and made.arm._is_save_due(5)


def test_an_arms_batches_start_at_its_step_with_its_seed_and_retention_rows(folder, monkeypatch, tmp_path, mesh):
    changes = {"seed": 9, "train.retention_rows": 2}
    made = make_arm(folder, monkeypatch, tmp_path, mesh, **changes)
    rows, retention = made.inputs.rows, made.inputs.retention
    order = pipeline.shuffle_questions(len(rows.rows), 9)
    for first in (0, 3):
        fed = []
        batch = next(made.arm._make_batches(first, lambda *pair, fed=fed: fed.append(pair)))
        others = [retention.draw(9, 8 * first + row) for row in range(2)]
        ((step, drawn),) = fed
        assert step == first + 1 and drawn.batch is batch and drawn.others == [other for _, other in others]
        assert batch.row_number_B.tolist() == list(range(8 * first, 8 * first + 8))
        assert prompts.unpad(batch.bare) == [rows.bare[order[number]] for number in batch.row_number_B.tolist()]
        assert prompts.unpad(batch.other) == [tokens for tokens, _ in others]


@pytest.mark.parametrize(("selected", "taken"), [(5, [12, 5]), (12, [12]), (None, [12])])
def test_an_arm_is_evaluated_after_its_last_step_and_at_the_one_that_is_selected(selected, taken, tmp_path):
    evaluated = []

    def evaluate_one(folder, split, params, step):
        evaluated.append((folder, split, params, step))
        return f"evaluation of {step}"

    arm = SimpleNamespace(
        train=lambda *given: "params of 12" if given == ("dev", on_dev, 2.0, {}) else None,
        selected_step=selected, read_student=lambda step: f"params of {step}", accuracies_with_context=(0.6, 0.9),
        alarms=SimpleNamespace(record={"skipped_steps": 3}),
    )  # fmt: skip
    on_dev = Evaluation({"acc_x": 0.2, "acc_xc": 0.95}, [], {}, {}, {})
    opened = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(steps=12)), evaluate=evaluate_one, dev="dev", test="test",
        started=2.0, seconds={},
    )  # fmt: skip
    found = run_lib._train_arm(opened, arm, tmp_path, on_dev)
    folders = [tmp_path, tmp_path / "selected"]
    assert evaluated == [(folder, "test", f"params of {step}", step) for folder, step in zip(folders, taken)]
    assert found.evaluation == "evaluation of 12" and found.learning == (0.95, (0.6, 0.9))
    assert found.selected == ((5, "evaluation of 5") if selected == 5 else None) and found.alarms == {
        "skipped_steps": 3
    }


@pytest.mark.parametrize("changed", ["", "versions", "commit", "device", "step"])
def test_an_evaluation_serves_again_if_the_same_code_made_it_after_as_many_steps(changed, tmp_path, mesh):
    made, expected = [], Evaluation({"acc_x": 0.5}, [], {}, {"bare": {"seed": 3}}, {"the": 7})

    def evaluate(facts: dict, taken: int) -> Evaluation:
        opened = run_lib._OpenRun(None, tmp_path, mesh, None, None, None, None, facts, None, 0.0, {})
        make = lambda params, name: made.append((params, name)) or expected  # noqa: E731
        return opened.evaluate(tmp_path / "one", make, STUDENT, taken)

    facts = {"versions": {"jax": "1"}, "commit": "a", "device": "one", "host": "here", "started": "then"}
    assert evaluate(facts, 3) is expected
    facts |= {"host": "there", "started": "now"} | ({changed: "another"} if changed in facts else {})
    assert evaluate(facts, 4 if changed == "step" else 3) == expected
    assert [name for _, name in made] == ["one"] * (1 + bool(changed))


def test_results_compare_every_arm_with_the_first_and_resample_as_configured(folder, monkeypatch):
    config = config_lib.experiment(settings(folder, **{"eval.bootstrap": 77, "train.steps": 12}), 1)
    made = {
        name: Evaluation({"acc_x": number / 8}, [], {"of": name}, {}, {})
        for number, name in enumerate(("base", "one", "two", "three", "best"))
    }
    arms = {
        name: run_lib._TrainedArm(made[name], None, f"learning of {name}", {"skipped_steps": number})
        for number, name in enumerate(("one", "two", "three"))
    }
    arms["two"] = arms["two"]._replace(selected=(5, made["best"]))
    compared, computed = [], []
    monkeypatch.setattr(metrics_lib, "compare_arms", lambda *given: compared.append(given) or {"harm_diff_one": 0.1})
    monkeypatch.setattr(metrics_lib, "compute_metrics", lambda *given: computed.append(given) or {"lowest": 0.3})
    results = run_lib._collect_results({"base": made["base"]}, arms, config)
    assert compared == [({"of": name}, {"of": "one"}, "one") for name in ("two", "three")]
    assert computed == [({"learning": f"learning of {name}"}, 77) for name in arms]
    own = {"step": 12, "lowest": 0.3}
    assert results == {
        "base": {"acc_x": 0.0},
        "one": own | {"acc_x": 0.125, "skipped_steps": 0},
        "two": own | {"acc_x": 0.25, "skipped_steps": 1, "harm_diff_one": 0.1, "selected": {"step": 5, "acc_x": 0.5}},
        "three": own | {"acc_x": 0.375, "skipped_steps": 2, "harm_diff_one": 0.1},
    }


@pytest.mark.slow
def test_the_summary_is_in_seconds_and_gibibytes(monkeypatch, capsys):
    monkeypatch.setattr(run_lib.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**19))  # KiB
    run_lib._print_summary({"base": {"acc_x": 0.5}}, {"load": 1.26, "total": 8.0}, Path("a/report.html"))
    last = (
        "seconds of this start: load 1.3, total 8.0\npeak memory of the host process: 1.50 GiB\nreport: a/report.html\n"
    )
    assert capsys.readouterr().out.endswith(last)


def test_a_run_prints_how_many_rows_each_split_lost(folder, monkeypatch, tmp_path, mesh, capsys):
    config = settings(folder, **{"prompt.max_bare_tokens": 200, "prompt.overlong": "drop", "run_arms": ("opcd",)})
    dropped = {"dev": 3, "test": 5}
    lost = [SimpleNamespace(dropped=count, measurable={"both_correct"}) for count in dropped.values()]
    monkeypatch.setattr(
        run_lib.Evaluator, "of_splits", lambda config, task, names, *_: lost if names == tuple(dropped) else 0
    )
    monkeypatch.setattr(run_lib, "compute_teacher_prefix", lambda *_: None)
    with workdir_lib.Lock(tmp_path) as lock:
        opened = run_lib._open(
            config_lib.experiment(config, 1), tmp_path, workdir_lib.collect_facts(config), mesh, lock, 0.0
        )
    kept = [row for row in opened.inputs.task.rows("train") if len(row.question) < 100]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"{len(kept)} training questions; left out: prompts that are too long: dev 3, test 5, train {24 - len(kept)}"
    )
    assert (opened.dev, opened.test) == tuple(lost) and 5 < len(kept) < 19


@pytest.mark.parametrize(("batch", "warned"), [(24, False), (32, True)])
def test_fewer_questions_than_a_batch_are_warned_of(batch, warned, folder, mesh, capsys):
    config = settings(folder, **{"train.batch_size": batch, "run_arms": ("opcd",)})
    run_inputs.open_inputs(config_lib.experiment(config, 1), mesh, {})
    said = "warning: there are only 24 training questions for batches of 32"
    assert (said in capsys.readouterr().out) == warned


def test_the_digests_of_inputs_tell_what_has_changed(folder, mesh):
    inputs = run_inputs.open_inputs(config_lib.experiment(settings(folder), 1), mesh, {})
    before = run_inputs.compute_digests(inputs)

    def differ(**changes) -> set[str]:
        now = run_inputs.compute_digests(inputs._replace(**changes))
        return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}

    def with_rows(split: str):
        """The same task, of which one question has another reference."""
        first, *rest = inputs.task.rows(split)
        mine = [first._replace(reference="7777"), *rest]
        rows = lambda name: mine if name == split else inputs.task.rows(name)  # noqa: E731
        return SimpleNamespace(rows=rows, other_contexts=inputs.task.other_contexts, rows_under=inputs.task.rows_under)

    rows, student = inputs.rows, inputs.student
    stretched = dataclasses.replace(student.config, rope_theta=77.0)
    as_computed = dataclasses.replace(student.config, remat="full", attention="splash", dtype="bfloat16")
    tokenizer = copy.deepcopy(student.tokenizer)
    tokenizer.chat_template += " "
    for field, value, changed in (
        ("config", stretched, {"architectures"}),
        ("config", as_computed, set()),
        ("tokenizer", tokenizer, {"tokenizer"}),
    ):
        another = dataclasses.replace(student, **{field: value})
        assert differ(student=another, teacher=another) == changed
    grouped = inputs.task.__class__.__new__(type("Grouped", (type(inputs.task),), {"group": lambda self, row: "one"}))
    grouped.__dict__.update(inputs.task.__dict__)
    assert differ(task=grouped) == {"groups"}
    for view in ("bare", "context"):
        ids = [*getattr(rows, view)[1:], [1, 2, 3]]
        assert differ(rows=dataclasses.replace(rows, **{view: ids})) == {"prompts"}
    contexts = [row._replace(context="another") for row in rows.rows]
    assert differ(rows=dataclasses.replace(rows, rows=contexts)) == {"contexts"}
    for split in ("train", "dev", "test"):
        assert "rows" in differ(task=with_rows(split)) and before["rows"].keys() == {"train", "dev", "test"}
    one = student.params | {"final_norm": student.params["final_norm"].at[0].set(7.0)}
    another = dataclasses.replace(student, params=one)
    assert differ(student=another, teacher=another) == {"model"}
    assert differ(teacher=another) == {"teacher", "architectures"}
    other = dataclasses.replace(student, stop_ids=(3, 9))
    assert differ(student=other, teacher=other) == {"stop_ids"} and before["stop_ids"] == [3]


def test_the_teachers_samples_are_of_the_questions_of_their_steps(folder, monkeypatch, tmp_path, mesh):
    config = config_lib.experiment(settings(folder, **{"run_arms": ("opcd",), "train.steps": 6}), 1)
    inputs = run_inputs.open_inputs(config, mesh, {})
    given = []

    def answer(params, batch, key, step, model, sampling):
        given.extend(prompts.unpad(jax.device_get(batch.context)))
        tokens = np.full((8, 5), 20 + step, np.int32)
        return Rollout(tokens, np.ones(tokens.shape, bool), np.full(tokens.shape, -0.5, np.float32))

    monkeypatch.setattr(teacher_samples, "teacher_rollout", answer)
    monkeypatch.setattr(teacher_samples, "steps_with_samples", lambda config, arm: [1, 4])
    found = teacher_samples.open_teacher_samples(config, inputs, tmp_path, mesh)
    assert {step: set(rollout.tokens_BxT.flat) for step, rollout in found.items()} == {1: {21}, 4: {24}}
    rows = [json.loads(line) for line in (tmp_path / teacher_samples.FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 8 + [5] * 8
    asked = dict(zip([row.id for row in inputs.rows.rows], inputs.rows.context))
    assert [asked[row["id"]] for row in rows] == given
    questions = {row.id: row.question for row in inputs.rows.rows}
    assert all(row["question"] == questions[row["id"]] for row in rows)


def test_an_arm_steps_evaluates_and_saves_in_turn(folder, monkeypatch, tmp_path, mesh):
    made = make_arm(folder, monkeypatch, tmp_path, mesh, **{"train.steps": 5, "train.save_every": 3, "eval.every": 2})
    arm, done, seconds, kept = made.arm, [], {}, made.arm._shared.record

    def note(name: str):
        return lambda *given: done.append((name, *given))

    names = ("write", "begin", "step", "flush", "pause", "sync", "close", "end_bar")
    writer = SimpleNamespace(kept=[], **{name: note(name) for name in names})
    fed = SimpleNamespace(sync=note("fed"), close=lambda: None)
    checkpoints = SimpleNamespace(save=lambda state, taken, record: done.append(("save", state, taken, record)))
    checkpoints.close = lambda: None
    inputs = SimpleNamespace(_asdict=dict)
    source = SimpleNamespace(next=lambda state, step: inputs)
    monkeypatch.setattr(arm_lib, "Checkpoints", lambda *_: checkpoints)
    monkeypatch.setattr(arm_lib.Arm, "_restore_or_init", lambda *_: (0, 0))
    monkeypatch.setattr(arm_lib, "Writer", lambda *_: writer)
    monkeypatch.setattr(arm_lib, "StepRows", lambda *_: fed)
    monkeypatch.setattr(arm_lib.Arm, "_make_source", lambda *_: source)
    monkeypatch.setattr(arm_lib.Arm, "_find_kind", lambda *_: "kind")
    programs = {"kind": lambda state, frozen: (state + 1, {"loss": float(state)})}
    monkeypatch.setattr(arm_lib.Arm, "_compile_programs", lambda arm, state, source, steps: programs)
    monkeypatch.setattr(
        arm_lib.Arm, "_evaluate", lambda arm, taken, state, dev, writer: note("evaluate")(taken, state, dev)
    )
    monkeypatch.setattr(arm_lib.Arm, "_join_student", lambda arm, state: f"student of {state}")
    started = time.monotonic() - 100
    on_dev = Evaluation({"acc_x": 0.25, "n": 3}, [], {}, {}, {})
    assert arm.train("dev", on_dev, started, seconds) == "student of 5"
    assert [own for own in done if own[0] in ("write", "step", "evaluate", "save")] == [
        ("write", 0, {"dev/acc_x": 0.25}), ("step", 1, {"loss": 0.0}), ("step", 2, {"loss": 1.0}),
        ("evaluate", 2, 2, "dev"),
        ("step", 3, {"loss": 2.0}), ("save", 3, 3, kept | {"data_position": 3}), ("step", 4, {"loss": 3.0}),
        ("evaluate", 4, 4, "dev"), ("step", 5, {"loss": 4.0}), ("save", 5, 5, kept | {"data_position": 5}),
    ]  # fmt: skip
    saves = [place for place, own in enumerate(done) if own[0] == "save"]
    assert all(done[place - 2 : place] == [("sync",), ("fed",)] for place in saves)
    assert 100 < seconds["first step done"] < time.monotonic() - started and seconds["opcd_retained compile"] < 50


def test_the_teachers_samples_are_kept_as_they_are_drawn(folder, monkeypatch, tmp_path, mesh):
    config = config_lib.experiment(settings(folder, **{"run_arms": ("opcd",), "train.steps": 6}), 1)
    inputs, asked = run_inputs.open_inputs(config, mesh, {}), []

    def answer(params, batch, key, step, model, sampling):
        asked.append(step)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return Rollout(np.full((8, 5), 20 + step, np.int32), np.ones((8, 5), bool), np.zeros((8, 5), np.float32))

    monkeypatch.setattr(teacher_samples, "teacher_rollout", answer)
    monkeypatch.setattr(teacher_samples, "STEPS_A_WRITE", 2)  # a file that is twice as long is written
    monkeypatch.setattr(teacher_samples, "steps_with_samples", lambda config, arm: [0, 1, 2, 3, 5])
    with pytest.raises(KeyboardInterrupt):
        teacher_samples.open_teacher_samples(config, inputs, tmp_path, mesh)
    found = teacher_samples.open_teacher_samples(config, inputs, tmp_path, mesh)
    assert asked == [0, 1, 2, 3, 2, 3, 5] and list(found) == [0, 1, 2, 3, 5]


@pytest.fixture
def train_base(monkeypatch, tmp_path):
    """Train a base of three steps that only returns this loss, in this folder; return how many steps were taken."""

    def train(loss: float, place) -> int:
        config = base.get_config()
        config.task, config.base.steps, config.base.batch_size, config.base.width = "rules", 3, 2, 16
        experiment, taken = config_lib.experiment(config, 1), []

        def update(params, opt_state, *given):
            taken.append(1)
            return params, opt_state, loss

        monkeypatch.setattr(base_model, "_update", update)
        try:
            with jax.set_mesh(one := make_mesh(devices=jax.devices()[:1])):
                base_model.train_base(experiment.base, rules.Rules(experiment.task_config), one, place)
        finally:
            train.steps = len(taken)

    return train


def test_a_base_that_has_diverged_is_not_kept(train_base, tmp_path):
    with pytest.raises(
        ValueError, match="the loss of the model from scratch is nan at step 3; lower its lr = .* .base.lr or"
    ):
        train_base(float("nan"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_cache_that_cannot_be_written_is_refused_before_the_base_is_trained(train_base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file, of base.cache or teacher_base.cache, cannot be written"):
        train_base(1.0, tmp_path / "file" / "base")
    assert train_base.steps == 0


def test_a_base_is_trained_with_its_own_fields_on_text_of_its_own_seed(monkeypatch, tmp_path):
    config = base.get_config()
    config.task, config.base.cache = "rules", "/none"
    fields = {"seed": 4, "steps": 3, "batch_size": 6, "lr": 0.01, "warmup_steps": 2, "weight_decay": 0.3, "width": 20}
    fields |= {"layers": 3, "query_heads": 6, "kv_heads": 3, "head_dim": 4, "mlp_width": 12, "rope_theta": 77.0}
    config.base.update(fields)
    experiment = config_lib.experiment(config, 1)
    world, calls, saved = rules.Rules(experiment.task_config), [], []

    def update(params, opt_state, given, responses, model, optimizer):
        calls.append((jax.device_get((given, responses)), model, optimizer))
        return params, opt_state, 0.0

    monkeypatch.setattr(base_model, "_update", update)
    monkeypatch.setattr(base_model, "_save", lambda *given: saved.append(given))
    with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
        base_model.train_base(experiment.base, world, mesh, tmp_path / "base")
    assert len(calls) == 3 and saved[0][0] == tmp_path / "base"
    (_, model, optimizer), tokenizer = calls[0], world.tokenizer()
    sizes = ("width", "layers", "query_heads", "kv_heads", "head_dim", "mlp_width", "rope_theta")
    assert [getattr(model, name) for name in sizes] == [fields[name] for name in sizes]
    own = [getattr(optimizer, name) for name in ("lr", "steps", "warmup_steps", "weight_decay")]
    assert own == [0.01, 3, 2, 0.3]
    rate = base_model._rise_and_decay(optimizer)
    assert [float(rate(step)) for step in range(3)] == pytest.approx([0.0, 0.005, 0.01])
    drawn = [world.pretraining_row(np.random.default_rng([4, 3, number])) for number in range(18)]
    for step, ((given, responses), *_) in enumerate(calls):
        for row, (question, context, answer) in zip(range(6), drawn[6 * step : 6 * step + 6]):
            prompt = prompts.unpad(jax.tree.map(np.asarray, given))[row]
            chat = [{"role": "user", "content": question}]
            chat = chat if context is None else [{"role": "system", "content": context}, *chat]
            assert prompt == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            kept = np.asarray(responses.tokens_BxT)[row][np.asarray(responses.mask_BxT)[row]].tolist()
            assert tokenizer.decode(kept) == answer + "<|end|>"


def test_a_draw_of_retention_rows_ends_even_if_no_pair_fits(folder, monkeypatch, mesh):
    opened = run_inputs.open_inputs(config_lib.experiment(settings(folder), 1), mesh, {})
    retention = opened.retention
    tokens, drawn = retention.draw(0, 0)
    (asked,) = opened.task.rows_under(retention.rows[drawn.row], retention.contexts[drawn.context])
    assert [tokens] == prompts.encode(opened.student.tokenizer, [asked], retention.prompt)
    draws, original = [], pipeline.draw_other
    monkeypatch.setattr(pipeline, "DRAWS", 20)
    monkeypatch.setattr(pipeline, "draw_other", lambda *given: draws.append(given) or original(*given))
    fault = "row 5: 20 pairs of 24 questions and 5 other contexts were drawn, and no prompt has at most 3 tokens"
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(retention, longest=[[1, 2, 3]], prefix=[]).draw(0, 5)
    assert [given[1:] for given in draws] == [(24, 5)] * 20
