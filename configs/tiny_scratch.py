"""The world of drafts, from end to end on two CPU cores: the context suggests a scratchpad that no question needs.

A tiny base learns tables, and to draft its answer if the system prompt says so (ctxjax/data/worlds/scratch.py). One
such prompt is then internalized; how long responses get when it comes back is a choice of the student.

    python -m ctxjax.main --config=configs/tiny_scratch.py --workdir=runs/scratch
"""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config(architecture: str = "llama") -> ConfigDict:
    config = tiny.get_config(architecture)
    config.task = "scratch"
    config.rollout.max_tokens = 37  # five drafts, two more than the base has seen, the answer, and the end token
    return config
