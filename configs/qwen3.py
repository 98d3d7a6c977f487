"""Qwen 3: ``--config=configs/qwen3.py:TASK,SIZE,TEACHER``, by default ``:file,8b`` with the student as its own teacher.

TASK is file, medical, safety, frozenlake, sokoban or math (configs/recipes.py); SIZE and TEACHER are 8b, 4b, 4b-2507 or
1.7b. The default SIZE of a game is that of its paper. ``:frozenlake,1.7b,4b`` distils from a larger teacher.
"""

from ml_collections import ConfigDict

from ctxjax.configs import recipes

MODELS = {
    "8b": "Qwen/Qwen3-8B",
    "4b": "Qwen/Qwen3-4B",
    "4b-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "1.7b": "Qwen/Qwen3-1.7B",
}
SIZES = {"": "8b", "frozenlake": "1.7b", "sokoban": "4b-2507"}  # default size of a task; "": of all others
# Size -> slice, chips along the tensor axis, micro-batches.
PLACES = {"8b": ("v5e:4x8", 4, 8), "4b": ("v5e:4x4", 4, 8), "4b-2507": ("v5e:4x4", 4, 8), "1.7b": ("v5e:2x4", 4, 8)}
# The same for responses of 16,384 tokens.
LONG = {
    "8b": ("v5p:4x4x4", 4, 4),
    "4b": ("v5p:2x4x4", 4, 4),
    "4b-2507": ("v5p:2x4x4", 4, 4),
    "1.7b": ("v5p:2x2x4", 4, 4),
}

THINKS = ("math",)  # the tasks with room for reasoning in rollout.max_tokens


def get_config(arguments: str = "") -> ConfigDict:
    config = recipes.make_config(arguments, MODELS, PLACES, LONG, SIZES)
    if config.model.path != MODELS["4b-2507"]:  # its template has no such switch
        config.prompt.thinking = config.task in THINKS
    return config
