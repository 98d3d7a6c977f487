"""The configurations of the model families: every setting loads, changes fields that exist, is an experiment."""

import pytest

from ctxjax import config as config_lib
from ctxjax.configs import base, llama3, qwen3, qwen25, recipes, smollm2
from ctxjax.data.splits import SPLITS
from ctxjax.data.tasks import TASKS
from ctxjax.data.tasks.text_game import TextGame
from ctxjax.plan import chips

FILES = {"llama3": llama3, "qwen25": qwen25, "qwen3": qwen3}
# The twelve settings of arXiv 2606.11627.
NCA = [
    f"{name}:{task},{size}"
    for task in ("medical", "safety")
    for name, size in (("llama3", "8b"), ("llama3", "3b"), ("qwen25", "7b"), ("qwen3", "8b"))
] + ["qwen3:frozenlake", "qwen3:sokoban", "qwen3:frozenlake,1.7b,4b", "qwen3:sokoban,1.7b,4b"]
OTHERS = ["llama3:", "qwen25:", "qwen3:", "llama3:medical,1b", "qwen25:medical,3b", "qwen3:safety,4b"]
OTHERS += [f"qwen3:math,{size}" for size in ("8b", "4b", "4b-2507", "1.7b")]
OTHERS += ["llama3:math", "llama3:math,1b", "qwen25:math", "qwen25:math,3b"]


def load(name: str):
    family, _, arguments = name.partition(":")
    return FILES[family].get_config(arguments) if arguments else FILES[family].get_config()


def fields(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", NCA + OTHERS)
def test_a_setting_overrides_fields_of_base_and_is_an_experiment_on_its_slice(name):
    config = load(name)
    assert set(fields(config)) == set(fields(base.get_config()))
    generation = chips.parse_generation(config.slice)
    assert generation in chips.CHIPS
    experiment = config_lib.experiment(config, chips.count_chips(config.slice))
    assert list(experiment.arms) == ["opcd", "opcd_anchored"]
    assert experiment.arms["opcd_anchored"].beta == 0.5
    assert experiment.optim.lr == 5e-6 and experiment.model.param_dtype == "float32" and experiment.lora is None


def test_recipes_have_the_published_sizes():
    medical, game, maths = load("llama3:medical"), load("qwen3:sokoban"), load("qwen3:math")
    assert (medical.train.batch_size, game.train.batch_size, maths.train.batch_size) == (128, 64, 128)
    assert (medical.rollout.max_tokens, game.rollout.max_tokens, maths.rollout.max_tokens) == (512, 1024, 16384)
    lengths = [config.prompt.max_context_tokens for config in (medical, game, maths)]
    assert lengths == [4096, 8192, 16384]
    assert [config.rollout.temperature for config in (medical, game, maths)] == [1.0, 0.7, 0.6]
    assert game.model.path == "Qwen/Qwen3-4B-Instruct-2507"
    assert load("qwen3:frozenlake,1.7b,4b").teacher.path == "Qwen/Qwen3-4B"


def test_an_argument_that_is_not_known_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="'chess' is not a task; choose from file, medical"):
        load("llama3:chess")
    with pytest.raises(ValueError, match="'70b' is not a size of this family; choose from 8b, 3b, 1b"):
        load("llama3:medical,70b")


@pytest.mark.parametrize(("name", "thinking"), [("medical", False), ("safety,4b", False), ("", False), ("math", True)])
def test_a_model_that_may_think_does_so_where_its_responses_have_room_for_it(name, thinking):
    config = load(f"qwen3:{name}")
    assert config.prompt.thinking is thinking and (config.rollout.max_tokens > 2048) is thinking


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thinking"), [("frozenlake", False), ("sokoban", None), ("sokoban,4b", False)])
def test_a_games_recipe_has_boards_for_its_steps_and_turns_that_win_them(name, thinking):
    config = load(f"qwen3:{name}")  # the default model of sokoban never thinks, and has no switch
    assert (config.prompt.placement, config.prompt.thinking, config.rollout.temperature) == ("user", thinking, 0.7)
    with pytest.raises(ValueError, match="text_game has no context; set text_game.context_file"):
        TextGame(config_lib.experiment(config, 8).task_config)
    ways = chips.count_chips(config.slice) // config.mesh.tensor
    assert config.train.batch_size // ways == config.train.micro_batches  # an episode of each
    config.text_game.context = "Look first."
    task = TextGame(config_lib.experiment(config, 8).task_config)
    sizes = {split: len(task.rows(split)) for split in SPLITS}
    assert sizes["train"] >= config.train.batch_size and min(sizes.values()) >= 59
    assert all(task.facts["boards"][split]["ceiling"] == 1.0 for split in ("dev", "test"))


def test_every_recipe_is_covered_by_a_setting():
    covered = {name.partition(":")[2].partition(",")[0] or "file" for name in NCA + OTHERS}
    assert covered == set(recipes.RECIPES)


@pytest.mark.parametrize("arguments", ["", "handbook", "style", "lora", "style,lora", "lora,handbook"])
def test_a_real_model_is_an_experiment_on_one_device(arguments):
    config = smollm2.get_config(arguments)
    own = {f"arms.{arm}.{field}" for arm, changes in smollm2.ARMS.items() for field in changes}
    assert set(fields(config)) == set(fields(base.get_config())) | own
    config.run_arms = tuple(config.arms)
    experiment = config_lib.experiment(config, 1)
    assert 0 < experiment.arms["opcd_warm"].off_policy_steps < experiment.train.steps
    assert experiment.task == ("style" if "style" in arguments else "handbook")
    assert (experiment.lora is not None) == ("lora" in arguments)
    assert experiment.model.path == smollm2.HUB_ID
    task = TASKS[experiment.task][1](experiment.task_config)
    assert len(task.rows("train")) >= experiment.train.batch_size and len(task.rows("dev")) == 24


def test_a_real_models_arguments_are_refused_if_unknown_or_two_tasks():
    with pytest.raises(ValueError, match="'poem' is not known; choose from handbook, style, lora"):
        smollm2.get_config("poem")
    with pytest.raises(ValueError, match="'handbook' and 'style' are two tasks; choose one"):
        smollm2.get_config("handbook,style")
