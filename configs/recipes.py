"""The experiments' recipes: what the papers publish of their settings, for the configurations of the model families.

Shared by all: AdamW (0.9, 0.999) with weight decay 0.01, a constant rate of 5e-6, clip 1, float32 weights with
bfloat16 arithmetic, one sample a prompt, 50 steps (arXiv 2602.12275; the anchor's beta = 0.5 is arXiv 2606.11627's
best). ``configs/base.py`` has these values already. Deviations from the papers are marked as such.
"""

from ml_collections import ConfigDict

from configs import base


def _common(config: ConfigDict) -> None:
    config.model.param_dtype = "float32"
    config.run_arms = ("opcd", "opcd_anchored")
    config.train.steps = 50
    config.train.save_every = 10  # deviation: the paper keeps every second step, which is 25 checkpoints of 96 GB at 8B
    config.prompt.overlong = "drop"


def _system_prompt(config: ConfigDict) -> None:
    """A system prompt is internalized: the context is the system message, and the bare view has the template's own."""
    _common(config)
    config.train.batch_size = 128
    config.prompt.placement = "system"
    config.prompt.max_bare_tokens = 1024  # deviation: the paper has one limit, for the prompt with its context
    config.prompt.max_context_tokens = 4096
    config.rollout.max_tokens = 512
    config.rollout.temperature = 1.0
    # Deviation: greedy evaluation, as harm compares two views; the paper samples (1.0, top-p 0.95, top-k 20).
    config.eval.batch_size = 128


def _medical(config: ConfigDict) -> None:
    """MedMCQA; the data and the optimised prompt are named on the command line (medical.path, medical.context_file)."""
    _system_prompt(config)
    config.task = "medical"


def _safety(config: ConfigDict) -> None:
    """TweetEval offensive, HateCheck and Ethos (safety.path, safety.context_file)."""
    _system_prompt(config)
    config.task = "safety"


def _file(config: ConfigDict) -> None:
    """Any questions (qa_jsonl.path) and any system prompt (qa_jsonl.context_file)."""
    _system_prompt(config)
    config.task = "qa_jsonl"


def _game(config: ConfigDict) -> None:
    """Lessons from experience go into the user's turn ahead of the board. A step is one turn of 64 episodes: the turns
    of an episode, up to 5, are sampled and updated on one after the other, so memory is that of one."""
    _common(config)
    config.train.batch_size = 64
    config.prompt.placement = "user"
    config.prompt.max_bare_tokens = 1024
    config.prompt.max_context_tokens = 8192
    config.rollout.max_tokens = 1024
    config.rollout.temperature = 0.7
    config.prompt.thinking = False
    config.eval.batch_size = 64


def _frozenlake(config: ConfigDict) -> None:
    _game(config)
    config.task = "frozenlake"


def _sokoban(config: ConfigDict) -> None:
    _game(config)
    config.task = "sokoban"


def _math(config: ConfigDict) -> None:
    """DAPO-Math: lessons from experience ahead of the problem, long thinking (math.path, math.context_file)."""
    _common(config)
    config.task = "math"
    config.train.batch_size = 128
    config.prompt.placement = "user"
    config.prompt.max_bare_tokens = 2048
    config.prompt.max_context_tokens = 16384
    config.prompt.thinking = True
    config.rollout.max_tokens = 16384
    config.rollout.temperature = 0.6
    config.eval.batch_size = 128


RECIPES = {
    "file": _file, "medical": _medical, "safety": _safety, "frozenlake": _frozenlake, "sokoban": _sokoban,
    "math": _math,
}  # fmt: skip


# Slice, chips along the tensor axis, micro-batches: see _place.
Place = tuple[str, int, int]


def setting(
    arguments: str, models: dict[str, str], places: dict[str, Place], long: dict[str, Place], sizes: dict[str, str]
) -> ConfigDict:
    """The configuration of a family's arguments "task,size,teacher", each of which may be left out.

    ``models``: size -> Hub id. ``places``: size -> where it is trained; ``long``: likewise, on responses of 16,384
    tokens. ``sizes``: the size that a task has by default; "": that of all others.
    Raises ValueError for a task that has no recipe, and for a size that the family does not have.
    """
    task, size, teacher = [part.strip().lower() for part in f"{arguments},,".split(",")][:3]
    task = task or "file"
    if task not in RECIPES:
        raise ValueError(f"argument {task!r} is no task; choose from {', '.join(RECIPES)}")
    size = size or sizes.get(task, sizes[""])
    config = base.get_config()
    config.model.path = _model(models, size)
    config.teacher.path = _model(models, teacher) if teacher else ""
    RECIPES[task](config)
    _place(config, *(long if task == "math" else places)[size])
    return config


def _model(models: dict[str, str], size: str) -> str:
    """The Hub id of a size. Raises ValueError that names the sizes there are."""
    if size not in models:
        raise ValueError(f"argument {size!r} is no size of this family; choose from {', '.join(models)}")
    return models[size]


def _place(config: ConfigDict, slice: str, tensor: int, micro_batches: int) -> None:
    """The slice that a setting is meant for, how its chips are used, and in how many parts a batch's gradient is made.

    Found with ``python -m ctxjax.plan``; tpu/README.md has the table."""
    config.slice = slice
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, tensor
    config.train.micro_batches = micro_batches
    config.model.remat = "full"
