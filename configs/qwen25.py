"""Qwen 2.5: ``--config=configs/qwen25.py:TASK,SIZE``, by default ``:file,7b``.

TASK is one of file, medical, safety, math (configs/recipes.py), SIZE one of 7b, 3b. The bare view has the template's
own system line, as in the papers.
"""

from ml_collections import ConfigDict

from configs import recipes

MODELS = {"7b": "Qwen/Qwen2.5-7B-Instruct", "3b": "Qwen/Qwen2.5-3B-Instruct"}
# Slice, chips along the tensor axis (key heads: 4 and 2), micro-batches.
PLACES = {"7b": ("v5e:4x8", 4, 8), "3b": ("v5e:4x4", 2, 8)}
# Responses of 16,384 tokens: where configs/qwen3.py trains its models of these sizes.
LONG = {"7b": ("v5p:4x4x4", 4, 4), "3b": ("v5p:2x4x4", 2, 4)}


def get_config(arguments: str = "") -> ConfigDict:
    return recipes.setting(arguments, MODELS, PLACES, LONG, {"": "7b"})
