"""The published settings of the papers' experiments, for the configurations of the model families.

All experiments use AdamW (0.9, 0.999) with weight decay 0.01, a constant learning rate of 5e-6, clip 1, float32 weights
with bfloat16 arithmetic, one sample per prompt, and 50 steps (arXiv 2602.12275). beta = 0.5 is the best value of
arXiv 2606.11627. ``configs/base.py`` has these values as defaults. Deviations from the papers are marked.
"""

import math

from ml_collections import ConfigDict

from ctxjax.configs import base


def _set_common(config: ConfigDict) -> None:
    config.model.param_dtype = "float32"
    config.run_arms = ("opcd", "opcd_anchored")
    config.train.steps = 50
    config.train.save_every = 10  # deviation: the paper saves every second step: 25 checkpoints of 96 GB for 8B
    config.prompt.overlong = "drop"


def _set_system_prompt(config: ConfigDict) -> None:
    """Internalize a system prompt: the context is the system message; the bare view has the template's own."""
    _set_common(config)
    config.train.batch_size = 128
    config.prompt.placement = "system"
    config.prompt.max_bare_tokens = 1024  # deviation: the paper limits only the prompt with the context
    config.prompt.max_context_tokens = 4096
    config.rollout.max_tokens = 512
    config.rollout.temperature = 1.0
    # Deviation: greedy evaluation, since harm compares two views. The paper samples (1.0, top-p 0.95, top-k 20).
    config.eval.batch_size = 128


def _set_medical(config: ConfigDict) -> None:
    """MedMCQA. Set the data and the optimised prompt on the command line (medical.path, medical.context_file)."""
    _set_system_prompt(config)
    config.task = "medical"


def _set_safety(config: ConfigDict) -> None:
    """TweetEval offensive, HateCheck and Ethos (safety.path, safety.context_file)."""
    _set_system_prompt(config)
    config.task = "safety"


def _set_file(config: ConfigDict) -> None:
    """Any questions (qa_jsonl.path) and any system prompt (qa_jsonl.context_file)."""
    _set_system_prompt(config)
    config.task = "qa_jsonl"


def _set_game(config: ConfigDict) -> None:
    """Internalize lessons from experience (text_game.context_file), which are written in the user's turn before the
    board. A step learns from all turns of 64 episodes."""
    _set_common(config)
    config.task = "text_game"
    config.train.batch_size = 64
    config.prompt.placement = "user"
    config.prompt.max_bare_tokens = 1024
    config.prompt.max_context_tokens = 8192
    config.rollout.max_tokens = 1024
    config.rollout.temperature = 0.7
    config.extract.max_tokens = 1024
    config.extract.limit = 7168  # with a turn of 1,024 tokens the most that a prompt may have
    config.eval.batch_size = 64


def _set_frozenlake(config: ConfigDict) -> None:
    """Deviation: 4 x 4 cells with three holes, of which there are 334 boards, and seven turns, as they need six moves.
    The paper's boards of 3 x 3 cells are only 19: text_game.size=3, text_game.pieces=2, text_game.turns=5."""
    _set_game(config)
    game = config.text_game
    game.game, game.size, game.pieces, game.turns = "frozenlake", 4, 3, 7


def _set_sokoban(config: ConfigDict) -> None:
    """Rooms of 6 x 6 cells, walls included, with one box. Deviation: all can be solved in the five turns."""
    _set_game(config)
    game = config.text_game
    game.game, game.size, game.pieces, game.turns = "sokoban", 6, 1, 5
    game.train_questions, game.dev_questions, game.test_questions = 512, 64, 128


def _set_math(config: ConfigDict) -> None:
    """DAPO-Math: lessons from experience before the problem, and long thinking (math.path, math.context_file)."""
    _set_common(config)
    config.task = "math"
    config.train.batch_size = 128
    config.prompt.placement = "user"
    config.prompt.max_bare_tokens = 2048
    config.prompt.max_context_tokens = 16384
    config.rollout.max_tokens = 16384
    config.rollout.temperature = 0.6
    config.extract.max_tokens = 16384
    config.extract.limit = 14336  # with a problem of 2,048 tokens the most that a prompt may have
    config.eval.batch_size = 128


RECIPES = {
    "file": _set_file,
    "medical": _set_medical,
    "safety": _set_safety,
    "frozenlake": _set_frozenlake,
    "sokoban": _set_sokoban,
    "math": _set_math,
}


# Slice, chips along the tensor axis, micro-batches: see _set_slice.
Place = tuple[str, int, int]


def make_config(
    arguments: str, models: dict[str, str], places: dict[str, Place], long: dict[str, Place], sizes: dict[str, str]
) -> ConfigDict:
    """Build the configuration for a family's arguments "task,size,teacher"; each of them may be empty.

    ``models``: size -> Hub id. ``places``: size -> slice and its use. ``long``: the same for responses of 16,384
    tokens. ``sizes``: task -> default size; the key "" is for all other tasks. Raises ValueError for a task without a
    recipe, and for a size that the family does not have.
    """
    task, size, teacher = [part.strip().lower() for part in f"{arguments},,".split(",")][:3]
    task = task or "file"
    if task not in RECIPES:
        raise ValueError(f"argument {task!r} is not a task; choose from {', '.join(RECIPES)}")
    size = size or sizes.get(task, sizes[""])
    config = base.get_config()
    config.model.path = _find_model(models, size)
    config.teacher.path = _find_model(models, teacher) if teacher else ""
    RECIPES[task](config)
    _set_slice(config, *(long if task == "math" else places)[size])
    return config


def _find_model(models: dict[str, str], size: str) -> str:
    """Return the Hub id of a size. Raises ValueError, which lists the known sizes."""
    if size not in models:
        raise ValueError(f"argument {size!r} is not a size of this family; choose from {', '.join(models)}")
    return models[size]


def _set_slice(config: ConfigDict, slice: str, tensor: int, micro_batches: int) -> None:
    """Set the slice, the mesh and the micro-batches of a setting.

    The values were found with ``python -m ctxjax.plan``; tpu/README.md has the table.
    """
    config.slice = slice
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, tensor
    config.train.micro_batches = micro_batches
    if config.task == "text_game":  # a micro-batch has the turns of one episode for every ``tensor`` chips
        chips = math.prod(map(int, slice.partition(":")[2].split("x")))
        config.train.micro_batches = config.train.batch_size * tensor // chips
    config.model.remat = "full"
