"""The world of policies, from end to end on two CPU cores: four rules in one context, a question needs one or two.

A tiny base learns to follow any policy from the system prompt, and to copy without one (ctxjax/data/worlds/policy.py).
One policy that it has never seen is then internalized.

    python -m ctxjax.main --config=configs/tiny_policy.py --workdir=runs/policy
"""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config(architecture: str = "llama") -> ConfigDict:
    config = tiny.get_config(architecture)
    config.task = "policy"
    config.base.steps = 2000  # after 800 it follows few policies yet: Acc_xc 7 %
    config.rollout.max_tokens = 11  # two steps, each the name of a rule and four letters; and the end token
    return config
