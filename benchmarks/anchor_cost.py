"""Measure the cost of anchoring: a step of configs/tiny.py with beta > 0 compared with beta = 0, by phase.

    python -m benchmarks.anchor_cost [--quick]

The base of configs/tiny.py comes from its cache, or is trained first (two minutes). Phases of one batch: "rollout"
(sampling), "update" (all passes, loss, backward passes, optimiser), "step" (both in one program). Arms: no anchor
(beta = 0), an anchor (beta = 0.5), and an anchor in every fourth step (loss.anchor_every): four consecutive steps are
timed and divided by four. Runs of the programs alternate; the fastest run of each counts. Prints one JSON object as the
last line. Recorded numbers: benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import time

import jax

from ctxjax import config as config_lib, sharding
from ctxjax.configs import tiny
from ctxjax.data.pipeline import encode_rows, training_batches
from ctxjax.data.tasks import TASKS
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, train_step, update_step
from ctxjax.inputs import base_model
from ctxjax.inputs.model_folder import open_folder
from ctxjax.types import Frozen

ARMS = {
    "plain": {"beta": 0.0},
    "anchored": {"beta": 0.5},
}
EVERY = 4  # one more arm is anchored in every fourth step
SOMETIMES = f"anchored_every_{EVERY}"


def run_sometimes_anchored(plain, anchored):
    """Return a function that runs EVERY steps, the last one anchored. Each program has its own state of equal size."""

    def steps():
        for _ in range(EVERY - 1):
            plain()
        return anchored()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three runs of each")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    config = config_lib.experiment(tiny.get_config(), jax.device_count())
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        task = TASKS[config.task][1](config.task_config)
        path = base_model.ensure_base(config.base, config.task, task, mesh)
        folder = open_folder(path, mesh, remat=config.model.remat)
        rows = encode_rows(folder.tokenizer, task.rows("train"), config.prompt)
        batches = training_batches(
            rows, None, seed=0, batch_size=config.train.batch_size, retention_rows=0, pad_id=folder.pad_id
        )
        batch = sharding.put_batch(next(batches), mesh)
        decode = config.rollout
        sampling = SamplingConfig(decode.max_tokens, folder.stop_ids, folder.pad_id, decode.temperature)
        loss = next(iter(config.arms.values()))
        frozen, programs = Frozen(folder.params), {}
        rollouts, update = (jax.jit(f, static_argnames="config") for f in (rollout_step, update_step))
        for name, change in ARMS.items():
            arm = dataclasses.replace(loss, **change)
            step = StepConfig(folder.config, folder.config, sampling, arm, config.optim)
            state = init_state(folder.params, step, jax.random.key(0))
            rollout, _ = rollouts(state, frozen, batch, config=step)

            def run_step(step=step, holder=[state]):  # noqa: B006 (the state is donated, and replaced)
                holder[0], metrics = train_step(holder[0], frozen, batch, config=step)
                return metrics

            state = init_state(folder.params, step, jax.random.key(0))
            programs[name, "rollout"] = lambda s=state, c=step: rollouts(s, frozen, batch, config=c)
            programs[name, "update"] = lambda s=state, y=rollout, c=step: update(s, frozen, batch, y, None, config=c)[1]
            programs[name, "step"] = run_step
        programs[SOMETIMES, "step"] = run_sometimes_anchored(programs["plain", "step"], programs["anchored", "step"])
        seconds: dict = {key: [] for key in programs}
        for run in range(4 if options.quick else 21):
            for key, function in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(function())
                if run:
                    seconds[key].append(time.perf_counter() - start)
    best = {key: min(values) for key, values in seconds.items()}
    best[SOMETIMES, "step"] /= EVERY
    milliseconds, over_plain = {}, {}
    for (name, phase), value in best.items():
        milliseconds.setdefault(name, {})[phase] = round(value * 1e3, 1)
        if name != "plain" and phase != "rollout":
            over_plain.setdefault(name, {})[phase] = round(value / best["plain", phase], 3)
    report = {"benchmark": "anchor_cost", "over_plain": over_plain, "milliseconds": milliseconds}
    print(json.dumps(report | {"devices": jax.device_count(), "jax": jax.__version__}))


if __name__ == "__main__":
    main()
