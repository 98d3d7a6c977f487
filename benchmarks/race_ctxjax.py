"""ctxjax in benchmarks/race.py; it also writes the rows that the other contestants read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import resource
import statistics
import sys
import time

STARTED = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from ctxjax import sharding  # noqa: E402
from ctxjax.config import experiment  # noqa: E402
from ctxjax.configs import smollm2  # noqa: E402
from ctxjax.data.pipeline import draw_steps  # noqa: E402
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, train_step, update_step  # noqa: E402
from ctxjax.host import memory  # noqa: E402
from ctxjax.inputs.run_inputs import compute_teacher_prefix, make_sampling_config, open_inputs  # noqa: E402
from ctxjax.types import Frozen  # noqa: E402


def open_race(task: dict):
    """Return (experiment, mesh, inputs) of the race's rows."""
    config = smollm2.get_config("handbook")
    config.model.path = task["model"]
    config.handbook.tokens, config.rollout.max_tokens = task["context"], task["new"]
    config.train.batch_size, config.run_arms = task["batch"], ("opcd", "opcd_anchored")
    built = experiment(config, device_count=1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return built, mesh, open_inputs(built, mesh, {})


def write_rows(task: dict) -> None:
    """Write what each step asks: token ids of both views, texts, and the numbers that sampling needs."""
    built, _, inputs = open_race(task)
    student, rows = inputs.student, inputs.rows
    steps = draw_steps(inputs.rows, None, seed=0, batch_size=task["batch"], retention_rows=0, pad_id=student.pad_id)
    numbers = []
    for drawn, _ in zip(steps, range(task["steps"] + 1)):
        tokens, mask = drawn.batch.bare.tokens_BxP, drawn.batch.bare.mask_BxP
        by_tokens = {tuple(bare): number for number, bare in enumerate(rows.bare)}
        numbers.append([by_tokens[tuple(row[real].tolist())] for row, real in zip(tokens, mask)])
    written = {
        "bare": [[list(rows.bare[i]) for i in step] for step in numbers],
        "context": [[list(rows.context[i]) for i in step] for step in numbers],
        "questions": [[rows.rows[i].question for i in step] for step in numbers],
        "document": rows.rows[0].context, "document_tokens": len(student.tokenizer.encode(rows.rows[0].context)),
        "stop_ids": list(student.stop_ids), "pad_id": student.pad_id, "lr": built.optim.lr,
    }  # fmt: skip
    Path(task["rows"]).write_text(json.dumps(written))


def median_seconds(runs: int, function) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def race(task: dict) -> dict:
    built, mesh, inputs = open_race(task)
    student = inputs.student
    result = {"document_tokens": json.loads(Path(task["rows"]).read_text())["document_tokens"]}
    with jax.set_mesh(mesh):
        sampling = make_sampling_config(built.rollout, student)
        config = StepConfig(student.config, student.config, sampling, built.arms["opcd"], built.optim)
        frozen = Frozen(student.params, None, compute_teacher_prefix(student, inputs.rows))
        steps = draw_steps(inputs.rows, None, seed=0, batch_size=task["batch"], retention_rows=0, pad_id=student.pad_id)
        batches = [sharding.put_batch(drawn.batch, mesh) for drawn, _ in zip(steps, range(task["steps"] + 1))]
        for name, column in (("opcd", "step"), ("opcd_anchored", "anchored")):
            state, times = init_state(student.params, config, jax.random.key(0)), []
            arm = dataclasses.replace(config, loss=built.arms[name])
            for batch in batches:
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(train_step(state, frozen, batch, arm))
                times.append(time.perf_counter() - start)
                if "first" not in result:
                    result["first"] = time.perf_counter() - STARTED
            if metrics["skipped"] or not np.isfinite(metrics["loss"]):
                raise RuntimeError(f"the loss of {name} is {metrics['loss']}")
            result[column] = statistics.median(times[1:])
            if name == "opcd":
                result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        sampled = jax.jit(lambda state, batch: rollout_step(state, frozen, batch, config)[0])
        rollouts = [sampled(state, batch) for batch in batches]
        result["tokens"] = float(np.mean([rollout.mask_BxT.sum() for rollout in rollouts[1:]]))
        result["rollout"] = median_seconds(task["steps"], lambda: sampled(state, batches[-1]))
        update = jax.jit(lambda state, batch, rollout: update_step(state, frozen, batch, rollout, None, config))
        jax.block_until_ready(update(state, batches[0], rollouts[0]))
        result["update"] = median_seconds(task["steps"], lambda: update(state, batches[-1], rollouts[-1]))
    return result


if __name__ == "__main__":
    memory.tune_memory()
    given = json.loads(sys.argv[1])
    if given["writes_rows"]:
        write_rows(given)
    else:
        print(json.dumps(race(given)))
