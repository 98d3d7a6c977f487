"""Measure how much faster episodes of a game are played at once than one at a time.

    python -m benchmarks.episodes [--quick]

A random model of the size of configs/tiny_grid.py plays 64 episodes of five turns of 8 tokens, with the prompts of that
world: all at once, and 16 of them one after the other. Both draw the same tokens, but for rounding. Runs alternate,
since the machine may be shared; the fastest of each counts. Prints one JSON object as the last line. Recorded numbers:
benchmarks/README.md.
"""

import argparse
import json
from types import SimpleNamespace

import jax

from benchmarks.sampler import best_of
from ctxjax import config as config_lib, sharding
from ctxjax.configs import tiny_grid
from ctxjax.data.grading.grade import Grade
from ctxjax.data.tasks import TASKS
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation.player import Player
from ctxjax.inputs.base_model import make_model_config
from ctxjax.models import params as params_lib, transformer

ALONE = 16


class FiveTurns:
    """A game that always lasts five turns, whatever is said."""

    max_turns = 5

    def play(self, row, responses):
        return Grade("", True) if len(responses) == 5 else row._replace(question=row.question + "ka")


def measure(episodes: int, runs: int) -> dict:
    config = config_lib.experiment(tiny_grid.get_config(), 1)
    world, mesh = TASKS["tiny_grid"][1](config.task_config), sharding.make_mesh(devices=jax.devices()[:1])
    tokenizer = world.tokenizer()
    model = make_model_config(config.base, len(tokenizer))
    folder = SimpleNamespace(config=model, tokenizer=tokenizer, stop_ids=(), pad_id=tokenizer.pad_token_id)
    sampling = SamplingConfig(config.rollout.max_tokens, (), folder.pad_id)
    rows = [row._replace(context=None) for row in world.rows("train")[:episodes]]
    together, alone = (Player(FiveTurns(), folder, config.prompt, most, mesh) for most in (episodes, 1))
    key, found = jax.random.key(0), {}

    with jax.set_mesh(mesh):
        params = params_lib.init(transformer.param_specs(model), key, mesh)

        def play_together():
            found["together"] = together.play(params, sampling, rows, key)

        def play_alone():
            found["alone"] = [alone.play(params, sampling, [row], key, i)[0] for i, row in enumerate(rows[:ALONE])]

        seconds = best_of(runs, {"together": play_together, "alone": play_alone})
    same = sum(
        [turn.tokens.tolist() for turn in one] == [turn.tokens.tolist() for turn in other]
        for one, other in zip(found["together"], found["alone"])
    )
    rates = {"together": 5 * episodes / seconds["together"], "alone": 5 * ALONE / seconds["alone"]}
    return {
        **{f"{name}_turns_per_second": round(rate) for name, rate in rates.items()},
        "ratio": round(rates["together"] / rates["alone"], 1),
        "same_episodes": f"{same} of {ALONE}",
        "host_share": round(1 - together.clock.sampler / together.clock.seconds, 2),
        "episodes": episodes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 episodes, one counted run of each")
    options = parser.parse_args()
    result = measure(16, 1) if options.quick else measure(64, 5)
    print(json.dumps({"benchmark": "episodes", **result, "versions": {"jax": jax.__version__}}))


if __name__ == "__main__":
    main()
