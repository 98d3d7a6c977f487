"""Every field of configs/base.py, changed, changes what its comment says it changes, and nothing else: the frozen
dataclasses that a run reads, field by field. And every one of their fields is reached by a field of the configuration.
"""

import dataclasses
import functools

import jax
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import base
from ctxjax.data.tasks import GAMES, TASKS
from ctxjax.host import command

DEVICES = 8
# Other legal values; numbers and switches are changed by ``another``.
VALUES = {
    "base.family": "qwen2", "teacher_base.family": "qwen3",
    "task": None, "slice": "v5e:4x4", "compile_cache": "", "run_arms": ("opcd_anchored", "opcd"),
    "model.path": "/another", "model.dtype": "bfloat16", "model.param_dtype": "bfloat16", "model.attention": "splash",
    "model.remat": "full", "teacher.path": "/teacher", "teacher.param_dtype": "bfloat16",
    "lora.targets": ("q", "down"), "lora.init": "/adapter", "base.cache": "/cache", "teacher_base.cache": "/cache",
    "mesh.data": 2, "mesh.tensor": 2, "mesh.slices": 1,
    "prompt.placement": "user", "prompt.date": "01 Feb 2023", "prompt.thinking": True, "prompt.overlong": "drop",
    "prompt.teacher_thinking": True, "prompt.keywords": ("effort=low",), "prompt.teacher_keywords": ("effort=high",),
    "teacher.reasoning": "cut",
    "rollout.weights": "stored", "rollout.top_p": 0.9, "teacher.top_p": 0.8, "eval.top_p": 0.7,
    "loss.off_policy_divergence": "jsd",
    "loss.divergence": "jsd", "loss.support": "union_top_k", "loss.remainder": "tail", "loss.anchor": "teacher_bare",
    "loss.gate": "token", "loss.masked_ids": (5, 6), "loss.teacher": "ema", "loss.averaging": "sequence_mean",
    "optim.schedule": "cosine", "train.batch_size": 64, "train.retention_rows": 32, "train.micro_batches": 2,
    "eval.batch_size": 64, "eval.views": ("other",), "eval.select": "-harm",
    "eval.meters": ("drift",),
    "alarms.stop": ("no_end",), "alarms.patience": 5,
    "base.batch_size": 32, "teacher_base.batch_size": 32, "base.query_heads": 8, "teacher_base.query_heads": 8,
    "base.kv_heads": 4, "teacher_base.kv_heads": 4, "records.skip": ("missing", "label"), "safety.sets": ("ethos",),
    "arms.off_policy.divergence": "jsd", "arms.sft.divergence": "reverse_kl", "hints.template": "Use {hint}.",
}  # fmt: skip
GRADED = {f"{task}.grading": "letter" for task in ("qa_jsonl", "hints")}
LISTS = {
    f"{task}.context_files": ("/a", "/b")
    for task in ("qa_jsonl", "medical", "safety", "math", "self_study", "text_game")
}
VALUES |= GRADED | LISTS
# What a field needs besides, to be legal or to have an effect.
NEEDED = {
    "teacher.reasoning": {"arms.off_policy.divergence": "cross_entropy"},
    "loss.off_policy_divergence": {"loss.off_policy_steps": 1},
    "model.param_dtype": {"lora.rank": 4}, "lora.alpha": {"lora.rank": 4}, "lora.rslora": {"lora.rank": 4},
    "lora.init": {"lora.rank": 4}, "lora.targets": {"lora.rank": 4},
    "eval.samples": {"eval.temperature": 0.5}, "mesh.slices": {"mesh.data": -1, "mesh.fsdp": 1},
}  # fmt: skip
TASK_OF = {"teacher_base.steps": "rules"}  # that field is for worlds only
NO_DATACLASS = {"compile_cache", "cpu_devices", "slice"}  # read by the commands themselves
ARMS = ("opcd", "off_policy")
SHARED = ("temperature", "top_k", "top_p")


def flat(tree, prefix: str = "") -> dict[str, object]:
    """The leaves of nested configurations or dataclasses by their path."""
    if dataclasses.is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {path: leaf for name, inner in tree.items() for path, leaf in flat(inner, f"{prefix}{name}.").items()}


DEFAULTS = flat(base.get_config().to_dict())
FIELDS = sorted(DEFAULTS)


def another(field: str):
    """Another legal value."""
    value = DEFAULTS[field]
    if field in VALUES:
        return VALUES[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return value + 1 if isinstance(value, int) else f"{value}/other"


def start(task: str, **changes):
    config = base.get_config()
    config.task, config.model.path = task, "/model"
    config.run_arms = ARMS[:1] if task in GAMES else ARMS  # in a game only the student plays
    config.update_from_flattened_dict(changes)
    return config


def leaves(config) -> dict[str, object]:
    return flat(config_lib.experiment(config, DEVICES))


def expected_paths(field: str, value, task: str, before: dict) -> dict[str, object]:
    """Where the field acts: path in the Experiment -> its new value."""
    section, _, name = field.rpartition(".")
    found = {field: value}
    if section == "loss":
        own = base.get_config().arms
        found = {f"arms.{arm}.{name}": value for arm in ARMS if name not in own[arm]}
    elif section.startswith("arms."):
        found = found if section.removeprefix("arms.") in ARMS else {}
    elif section in ("eval", "teacher") and name in SHARED:
        found = {f"{section}.decode.{name}": value}
    elif field == "lora.init":
        found = {"lora_init": value}
    elif section == "rollout":
        found |= {f"teacher.decode.{name}": value}
        found |= {f"eval.decode.{name}": value} if name not in SHARED else {}
        found |= {f"arms.{arm}.temperature": value for arm in ARMS if name == "temperature"}
    elif section == "base":
        found |= {f"teacher_base.{name}": value} if name != "steps" else {}
    elif section == "prompt" and task == "self_study":
        found |= {f"task_config.prompt.{name}": value}
    elif section == "records":
        found = {f"task_config.records.{name}": value} if "task_config.records.skip" in before else {}
    elif section in TASKS:
        found = {f"task_config.{name}": value} if section == task else {}
        if field == "safety.path" and task == "tiny_safety":
            found = {"task_config.path": value}
    elif field in NO_DATACLASS:
        found = {}
    more = {
        "seed": {path: value for path in ("base.seed", "teacher_base.seed", "extract.seed") if path in before}
        | {path: value for path in ("task_config.seed", "task_config.context_seed") if path in before},
        "model.param_dtype": {"teacher.param_dtype": value},
        "model.path": {"task_config.writer": value} if task == "self_study" else {},
        "base.cache": {"task_config.cache": value} if task == "self_study" else {},
        "rollout.max_tokens": {"task_config.longest_reference": value} if task == "self_study" else {},
        "train.steps": {"optim.steps": value},
        "train.batch_size": {"train.retention_rows": value},
        "mesh.data": {"mesh.fsdp": 4}, "mesh.tensor": {"mesh.fsdp": 4},
    }  # fmt: skip
    return found | more.get(field, {})


@functools.cache
def changes_of(field: str, task: str) -> tuple[dict, dict]:
    """(what changing the field changes, what it should): path -> new value."""
    value, needed = another(field), NEEDED.get(field, {})
    before, after = leaves(start(task, **needed)), leaves(start(task, **needed | {field: value}))
    expected = expected_paths(field, value, task, before)
    return {path: after[path] for path in after if path not in before or before[path] != after[path]}, expected


SPECIAL = {"task", "run_arms", "lora.rank", "mesh.fsdp"}  # they have a test of their own
PER_TASK = [(field, task) for task in TASKS for field in FIELDS if field.split(".")[0] in TASKS or field == "seed"]
PER_TASK += [(field, task) for task in TASKS for field in FIELDS if field.startswith("records.")]
PER_TASK += [(field, "self_study") for field in FIELDS if field.startswith("prompt.")]  # its writer is asked with them
ORDINARY = [(field, "qa_jsonl") for field in FIELDS if field.split(".")[0] not in {*TASKS, "records", "seed"}]


@pytest.mark.parametrize("section", sorted({field.split(".")[0] for field in FIELDS}))
def test_a_field_changes_what_it_is_to_change_and_nothing_else(section):
    for field, task in ORDINARY + PER_TASK:
        if field.split(".")[0] != section or field in SPECIAL:
            continue
        task = TASK_OF.get(field, task)
        assert another(field) != DEFAULTS[field]
        changed, expected = changes_of(field, task)
        assert changed == expected, (field, task)
        assert expected or field in NO_DATACLASS or section in {"arms", "records", *TASKS}, field


def test_fields_that_decide_which_others_there_are_or_take_what_others_leave():
    mesh = config_lib.experiment(start("qa_jsonl", **{"mesh.data": -1, "mesh.fsdp": 4}), DEVICES).mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 4, 1)
    one, two = (config_lib.experiment(start("qa_jsonl", **{"lora.rank": rank}), DEVICES) for rank in (0, 3))
    assert one.lora is None and (two.lora.rank, two.lora.alpha, two.lora.scale) == (3, 32.0, 32.0 / 3)
    arms = config_lib.experiment(start("qa_jsonl", run_arms=VALUES["run_arms"]), DEVICES).arms
    assert list(arms) == list(VALUES["run_arms"])
    assert (arms["opcd_anchored"].beta, arms["opcd"].beta) == (0.5, 0.0)
    for task, (task_class, _) in TASKS.items():
        experiment = config_lib.experiment(start(task), DEVICES)
        assert experiment.task == task and type(experiment.task_config) is task_class


def test_every_field_of_the_dataclasses_is_reached_by_a_field_of_the_configuration():
    reached, present = {"task", "lora.rank", "mesh.fsdp", "teacher_base.steps"}, set()  # by the tests above
    for task in TASKS:
        for field, of_task in ORDINARY + PER_TASK:
            if of_task == task and field not in SPECIAL | TASK_OF.keys():
                reached |= {(task, path) if path.startswith("task_") else path for path in changes_of(field, task)[0]}
        paths = leaves(start(task, **{"lora.rank": 4}))
        present |= {(task, path) if path.startswith("task_") else path for path in paths}
    # The command that evaluates sets whether a context is required; three tasks have no column of contexts.
    made = {(task, "task_config.required") for task in TASKS}
    made |= {(task, "task_config.context_column") for task in ("safety", "self_study", "text_game")}
    assert present - made == reached


def test_the_commands_read_the_fields_that_no_dataclass_has(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.__setitem__(name, value))
    monkeypatch.setattr(command, "quieten", lambda: None)
    monkeypatch.setattr(command, "_split_cpu", lambda count: updates.__setitem__("devices", count))
    config = start("qa_jsonl", compile_cache=str(tmp_path / "xla"), cpu_devices=3)
    command.prepare(config)
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "xla") and updates["devices"] == 3
    updates.clear()
    command.prepare(start("qa_jsonl", compile_cache=""))
    assert updates == {"devices": 0}
