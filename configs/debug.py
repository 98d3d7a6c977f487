"""Every part of a run once, in seconds: a base of few steps, two arms, an evaluation, a report.

For developers: it says whether a change still runs from end to end, nothing about learning. The arm ``opcd_retained``
has all three terms, ``off_policy`` learns from the teacher's samples. Most of its time is compiling.
"""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.cpu_devices = 1  # programs for one device compile faster
    config.run_arms = ("opcd_retained", "off_policy")

    config.base.steps, config.base.warmup_steps, config.base.batch_size = 10, 1, 8
    config.base.width, config.base.layers, config.base.mlp_width = 32, 1, 32
    config.base.query_heads, config.base.kv_heads, config.base.head_dim = 2, 1, 16

    config.model.remat = "none"
    config.train.steps, config.train.batch_size, config.train.save_every = 3, 8, 2
    config.optim.warmup_steps = 1

    config.rules.train_questions, config.rules.dev_questions, config.rules.test_questions = 64, 8, 8
    config.eval.every, config.eval.batch_size, config.eval.bootstrap = 2, 8, 20
    config.eval.temperature = config.rollout.temperature  # one program samples for all views and for dev/distill
    return config
