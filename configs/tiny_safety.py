"""Real text in a model that trains here: is a tweet or comment offensive, asked by a system prompt.

A small Llama learns from scratch, on TweetEval, HateCheck and Ethos, to do what a system prompt asks of a text
(ctxjax/data/worlds/tiny_safety.py); the safety prompt, which it has never seen, is then internalized in four arms.

    python -m ctxjax.main --config=configs/tiny_safety.py --config.safety.path=FOLDER --workdir=runs/tiny_safety
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.task = "tiny_safety"
    # Small and short: 9,600 texts are soon known by heart, and what is learned then does not carry over to others.
    config.base.steps = 800
    config.base.batch_size = 128
    config.base.lr = 3e-3
    config.base.width, config.base.layers, config.base.mlp_width = 64, 2, 192
    config.base.query_heads, config.base.kv_heads = 2, 1

    config.rollout.max_tokens = 12  # the longest answer, its tags and the end token, and some to go wrong in
    config.train.steps = 100
    config.train.save_every = 100
    config.eval.every = 100
    config.run_arms = ("off_policy", "opcd", "opcd_anchored", "opcd_retained")
    return config
