"""Open what a run reads before anything is computed: task, models, encoded questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import time
from typing import NamedTuple

import jax
import numpy as np

from ctxjax import sharding
from ctxjax.config_sections import DecodeConfig, Experiment
from ctxjax.data import contexts as contexts_lib, prompts as prompts_lib, splits
from ctxjax.data.pipeline import EncodedRows, RetentionRows, encode_rows
from ctxjax.data.task import GameTask, GroupedTask, Row, Task, longest_turns
from ctxjax.data.tasks import TASKS
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.host import progress
from ctxjax.host.checksum import compute_digest, compute_fingerprint
from ctxjax.host.hub import find_folder
from ctxjax.inputs import base_model, question_writer
from ctxjax.inputs.batch_shapes import find_batch_shapes
from ctxjax.inputs.model_folder import ModelFolder, load_tokenizer, open_folder, read_folder
from ctxjax.models import lora, transformer
from ctxjax.models.hf import adapters
from ctxjax.models.hf.family import OURS
from ctxjax.types import Params, PrefixKV

# Fields that name files and folders whose contents ``compute_digests`` covers, so that a run goes on elsewhere.
MOVABLE = frozenset((
    "model.path", "teacher.path", "lora.init", "base.cache", "teacher_base.cache",
    "self_study.cache", "self_study.path", "self_study.writer", "safety.path", "tiny_safety.path",
    "tiny_grid.context_file", "qa_jsonl.other_rows",
    *(f"{task}.path" for task in ("qa_jsonl", "medical", "math", "hints")),
    *(f"{task}.test_path" for task in ("medical", "math", "hints")),
    *(
        f"{task}.{field}"
        for task in ("qa_jsonl", "medical", "safety", "math", "self_study", "text_game")
        for field in ("context_file", "context_files", "other_contexts_file")
    ),
    *(f"{task}.other_contexts_file" for task in ("hints", "style")),
))  # fmt: skip


class Inputs(NamedTuple):
    """What training reads. ``teacher`` is ``student`` itself if the teacher has no own folder. ``retention``: the rows
    under other contexts, or None if no arm needs them."""

    task: Task
    student: ModelFolder
    teacher: ModelFolder
    rows: EncodedRows
    retention: RetentionRows | None


def open_inputs(config: Experiment, mesh, seconds: dict[str, float]) -> Inputs:
    """Open a run's task and models and encode the training rows. ``seconds``: gets the time of each part."""
    question_writer.ensure_questions(config, mesh)
    with progress.Bar("reading the questions"):
        task = TASKS[config.task][1](config.task_config)
        splits.check_splits(task)
    if contexts_lib.has_context_per_row(task.rows("train")):
        print(
            "warning: every training question has its own context; what such contexts teach often does not transfer to "
            "questions without a context, unlike what a shared context teaches"
        )
    own = config.model.path
    tokenizer = load_tokenizer(find_folder(own, weights=False)) if own else task.tokenizer()
    rows, retention = _encode(config, task, tokenizer)
    prompts = [*rows.longest["bare"], *rows.longest["context"], *(retention.longest if retention else [])]
    _check_models(config, tokenizer, prompts, mesh)
    teacher_path = _prepare_teacher_path(config, task, mesh, seconds)
    path = prepare_student_path(config, task, mesh, seconds)
    student = open_student(config, path, mesh, seconds)
    folder, teacher = open_teacher(config, teacher_path, student, mesh, seconds)
    if config.teacher.offload:
        is_one = teacher is folder
        teacher = dataclasses.replace(teacher, params=sharding.offload_to_host(teacher.params))
        folder = teacher if is_one else folder
    return Inputs(task, folder, teacher, rows, retention)


def _check_models(config: Experiment, tokenizer, prompts: list[list[int]], mesh) -> None:
    """Raise ValueError, before any weights are fetched, read or trained, if a model cannot read these prompts, or if
    the teacher has other tokens than the student."""
    own, teacher = config.model, config.teacher.path
    if own.path:
        student = read_folder(own.path, mesh, own.dtype, own.remat, own.attention, tokenizer=tokenizer)
    else:
        student = ModelFolder(base_model.make_model_config(config.base, len(tokenizer)), None, tokenizer, (), 0)
    models = [student]
    if teacher:
        models.append(read_folder(teacher, mesh, own.dtype, attention=own.attention, student=student))
    for model in models:
        model.check_prompts(prompts, config.rollout.max_tokens)


def _encode(config: Experiment, task: Task, tokenizer) -> tuple[EncodedRows, RetentionRows | None]:
    """Encode the training rows; print the batch's shapes, and warnings."""
    told = config.prompt.teacher_thinking
    compared = [name for name, loss in config.arms.items() if loss.needs_teacher]
    if told not in (None, config.prompt.thinking) and compared:
        print(
            f"warning: prompt.teacher_thinking = {told} and prompt.thinking = {config.prompt.thinking}, and "
            f"{', '.join(compared)} asks the teacher about responses without the reasoning that it expects, or with "
            "one that it does not; such a teacher is for loss.divergence = cross_entropy on its own samples (sft)"
        )
    with progress.Bar("encoding the training questions"):
        every = [row for split in ("train", "dev", "test") for row in task.rows(split)]
        quoted = prompts_lib.describe_quoted_control_tokens(tokenizer, every)
        rows, retention = encode_training_rows(config, task, tokenizer)
    if quoted:
        print(f"warning: {quoted}")
    if retention and retention.left_out:
        print(
            f"warning: retention leaves out {retention.left_out} other contexts and keeps {len(retention.contexts)}: "
            f"with the longest question they exceed prompt.max_context_tokens = {config.prompt.max_context_tokens}"
        )
    if len(rows.rows) < config.train.batch_size:
        print(
            f"warning: there are only {len(rows.rows)} training questions for batches of {config.train.batch_size}, so "
            "that a step asks some of them more than once; lower train.batch_size"
        )
    outliers = describe_outliers(rows, retention)
    if outliers:
        print(f"warning: {outliers}")
    turns = task.max_turns if isinstance(task, GameTask) else 1
    print(f"batch: {find_batch_shapes(config, rows, retention, turns).describe()}")
    print(f"the context takes {rows.saved_tokens} tokens of a prompt, which the student will not need", flush=True)
    return rows, retention


def describe_outliers(rows: EncodedRows, retention: RetentionRows | None) -> str:
    """Return a warning if a few long prompts pad all training rows; "" if not."""
    outliers = rows.describe_outliers() or (retention.describe_outliers() if retention else "")
    return outliers and f"training questions: {outliers}"


def encode_training_rows(config: Experiment, task: Task, tokenizer) -> tuple[EncodedRows, RetentionRows | None]:
    """Encode the training rows and, if an arm needs them, prepare those under other contexts."""
    if config.has_retention:
        contexts_lib.check_retention(task.other_contexts("train"), config.task, config.task_config)
    questions = task.rows("train")
    rows = encode_rows(tokenizer, questions, config.prompt, longest_turns(task, questions))
    retention = RetentionRows.build(tokenizer, task, rows, config.prompt) if config.has_retention else None
    return rows, retention


def _prepare_teacher_path(config: Experiment, task: Task, mesh, seconds: dict[str, float]) -> str:
    """Return the teacher's own folder, or "" if it has none. Train the teacher first if configured."""
    if not config.teacher_base.steps:
        return config.teacher.path
    clock = time.monotonic()
    path = base_model.ensure_base(config.teacher_base, config.task, task, mesh)
    seconds["teacher from scratch"] = time.monotonic() - clock
    return str(path)


def open_teacher(
    config: Experiment, path: str, student: ModelFolder, mesh, seconds: dict[str, float]
) -> tuple[ModelFolder, ModelFolder]:
    """Return (student, teacher). They are the same object if ``path``, the teacher's folder, is "".

    Both use the student's tokenizer. A response ends at the stop ids of either model, so that a base model as student
    learns to end responses as its teacher does.
    """
    if not path:
        return student, student
    clock = time.monotonic()
    model = config.model
    loaded = open_folder(
        path, mesh, model.dtype, config.teacher.param_dtype, attention=model.attention, student=student
    )
    seconds["load teacher"] = time.monotonic() - clock
    print(f"teacher: {path}; {loaded.config.arithmetic}", flush=True)
    student = dataclasses.replace(student, stop_ids=tuple(sorted({*student.stop_ids, *loaded.stop_ids})))
    return student, dataclasses.replace(student, config=loaded.config, params=loaded.params, adapter=None)


def prepare_student_path(config: Experiment, task: Task, mesh, seconds: dict[str, float]) -> str:
    """Return the student's folder or Hub id. Train a base first if there is none. ``seconds``: gets its time."""
    if config.model.path:
        return config.model.path
    clock = time.monotonic()
    path = base_model.ensure_base(config.base, config.task, task, mesh)
    seconds["base from scratch"] = time.monotonic() - clock
    return str(path)


def open_student(config: Experiment, path: str, mesh, seconds: dict[str, float]) -> ModelFolder:
    """Open the folder or Hub id ``path`` with the adapter of lora.init, if there is one. ``seconds``: gets the time."""
    clock, model = time.monotonic(), config.model
    adapter = read_first_adapter(config, path, mesh)  # one that does not fit is refused before the weights are read
    folder = open_folder(path, mesh, model.dtype, model.param_dtype, model.remat, model.attention)
    if adapter is not None:
        joined = lora.join(folder.params, adapter, config.lora)
        folder = dataclasses.replace(folder, params=joined, adapter=adapter)
        print(f"adapter: {config.lora_init}", flush=True)
    seconds["load"] = time.monotonic() - clock
    print(f"model: {path}; {folder.config.arithmetic}", flush=True)
    return folder


def read_first_adapter(config: Experiment, path: str, mesh) -> Params | None:
    """Read the adapter that the student starts from, for the model ``path``; None if it starts from a new one."""
    if not config.lora_init:
        return None
    return adapters.load(Path(config.lora_init).expanduser(), path, find_folder(path), config.lora, mesh)


def compute_teacher_prefix(teacher: ModelFolder, rows: EncodedRows) -> PrefixKV | None:
    """Return the teacher's keys and values of the shared prefix; None if there is none.

    The teacher is frozen, so this is computed once for all arms.
    """
    prefix_C = rows.prefixes["context"]
    if not prefix_C:
        return None
    print(f"all prompts with context share their first {len(prefix_C)} tokens, read once per pass", flush=True)
    compute, tokens = jax.jit(transformer.prefix_kv, static_argnames="config"), np.asarray(prefix_C, np.int32)
    with progress.Bar("compiling the teacher's pass over them"):
        return compute(sharding.bring_to_device(teacher.params), config=teacher.config, prefix_C=tokens)


def _list_other_rows(task: Task, split: str) -> list[Row]:
    """Return what is asked under every other context of a split, in place of its first row."""
    return [row for context in task.other_contexts(split) for row in task.rows_under(task.rows(split)[0], context)]


def compute_digests(inputs: Inputs) -> dict:
    """Return digests of all inputs by name; a run is resumed only with the same inputs.

    They are computed from values, not from file names: the models' weights and architectures, the tokenizer, the
    questions with contexts and references, their groups, and (``prompts``) the token ids of the training rows.
    ``stop_ids``: the ids that end a response, themselves.
    """
    task, rows, tokenizer = inputs.task, inputs.rows, inputs.student.tokenizer
    every = [row for split in ("train", "dev", "test") for row in task.rows(split)]
    models = {"model": inputs.student} | ({} if inputs.teacher is inputs.student else {"teacher": inputs.teacher})
    return {
        **{name: compute_fingerprint(sharding.bring_to_device(folder.params)) for name, folder in models.items()},
        "rows": {split: compute_digest(task.rows(split)) for split in ("train", "dev", "test")},
        "contexts": compute_digest(sorted({row.context or "" for row in rows.rows})),
        "other_contexts": compute_digest([_list_other_rows(task, split) for split in ("train", "dev", "test")]),
        "prompts": compute_digest([rows.bare, rows.context]),
        "stop_ids": list(inputs.student.stop_ids),
        "architectures": {name: compute_digest(_describe_architecture(folder)) for name, folder in models.items()},
        "tokenizer": compute_digest([tokenizer.get_vocab(), tokenizer.chat_template]),
        "groups": compute_digest([task.group(row) for row in every] if isinstance(task, GroupedTask) else []),
    }


def _describe_architecture(folder: ModelFolder) -> dict[str, str]:
    """Return what a model computes besides its weights: the fields of its config.json, without those at their defaults,
    so that a field that is added later changes nothing."""
    fields = (field for field in dataclasses.fields(folder.config) if field.name not in OURS)
    values = {field.name: (getattr(folder.config, field.name), field.default) for field in fields}
    return {name: repr(value) for name, (value, default) in values.items() if value != default}


def make_sampling_config(decode: DecodeConfig, folder: ModelFolder, samples: int = 1) -> SamplingConfig:
    """Combine decoding options with the model's stop ids and pad id."""
    return SamplingConfig(
        max_tokens=decode.max_tokens,
        eos_ids=folder.stop_ids,
        pad_id=folder.pad_id,
        temperature=decode.temperature,
        top_k=decode.top_k,
        top_p=decode.top_p,
        weights=decode.weights,
        samples=samples,
    )
