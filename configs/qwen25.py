"""Qwen 2.5: ``--config=configs/qwen25.py:TASK,SIZE``, by default ``:file,7b``.

TASK is one of file, medical, safety, math (configs/recipes.py), SIZE one of 7b, 3b. The bare view has the template's
own system line, as in the papers.
"""

from ml_collections import ConfigDict

from configs import base, recipes

MODELS = {"7b": "Qwen/Qwen2.5-7B-Instruct", "3b": "Qwen/Qwen2.5-3B-Instruct"}
# Slice, chips along the tensor axis (key heads: 4 and 2), micro-batches.
PLACES = {"7b": ("v5e:4x8", 4, 8), "3b": ("v5e:4x4", 2, 8)}


def get_config(arguments: str = "") -> ConfigDict:
    task, size, teacher = recipes.chosen(arguments, task="file", size="7b")
    config = base.get_config()
    config.model.path = recipes.model(MODELS, size)
    config.teacher.path = recipes.model(MODELS, teacher) if teacher else ""
    recipes.RECIPES[task](config)
    recipes.place(config, *PLACES[size])
    return config
