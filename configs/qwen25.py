"""Qwen 2.5: ``--config=configs/qwen25.py:TASK,SIZE``, by default ``:file,7b``.

TASK is file, medical, safety or math (configs/recipes.py); SIZE is 7b or 3b. The bare view has the template's own
system message, as in the papers.
"""

from ml_collections import ConfigDict

from ctxjax.configs import recipes

MODELS = {"7b": "Qwen/Qwen2.5-7B-Instruct", "3b": "Qwen/Qwen2.5-3B-Instruct"}
# Size -> slice, chips along the tensor axis (the models have 4 and 2 key heads), micro-batches.
PLACES = {"7b": ("v5e:4x8", 4, 8), "3b": ("v5e:4x4", 2, 8)}
# The same for responses of 16,384 tokens, taken from the models of these sizes in configs/qwen3.py.
LONG = {"7b": ("v5p:4x4x4", 4, 4), "3b": ("v5p:2x4x4", 2, 4)}


def get_config(arguments: str = "") -> ConfigDict:
    return recipes.make_config(arguments, MODELS, PLACES, LONG, {"": "7b"})
