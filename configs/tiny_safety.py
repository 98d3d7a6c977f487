"""Real text in a small model: a system prompt asks whether a tweet or comment is offensive.

A small Llama learns from scratch, on TweetEval, HateCheck and Ethos, to answer what a system prompt asks about a text
(ctxjax/data/worlds/tiny_safety.py). The safety prompt, which it has never seen, is then internalized in four arms.

    python -m ctxjax.main --config=configs/tiny_safety.py --config.safety.path=FOLDER --workdir=runs/tiny_safety
"""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.task = "tiny_safety"
    # A small model and short training: it soon memorizes the 9,600 texts, and does not generalize after that.
    config.base.steps = 800
    config.base.batch_size = 128
    config.base.lr = 3e-3
    config.base.width, config.base.layers, config.base.mlp_width = 64, 2, 192
    config.base.query_heads, config.base.kv_heads = 2, 1

    config.rollout.max_tokens = 12  # the longest answer with tags and end token, and a few more for wrong answers
    config.train.steps = 100
    config.train.save_every = 100
    config.eval.every = 100
    config.run_arms = ("off_policy", "opcd", "opcd_anchored", "opcd_retained")
    return config
