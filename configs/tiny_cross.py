"""The world of configs/tiny.py with a larger teacher: 3.2M parameters for a student of 0.8M, both from scratch."""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.teacher_base.steps = 600
    config.teacher_base.width, config.teacher_base.mlp_width = 256, 704
    config.teacher_base.query_heads, config.teacher_base.kv_heads = 8, 4
    config.run_arms = ("off_policy", "opcd", "opcd_anchored", "opcd_retained")
    return config
