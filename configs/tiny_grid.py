"""A game of several turns, from end to end on two CPU cores.

A tiny base learns to walk over grids whose symbols and move words a legend in the system prompt explains
(ctxjax/data/worlds/tiny_grid.py). One legend that it has never seen is then internalized: every step plays whole
episodes, and evaluation counts boards that are won.

    python -m ctxjax.main --config=configs/tiny_grid.py --workdir=runs/tiny_grid
"""

from ml_collections import ConfigDict

from ctxjax.configs import tiny


def get_config(architecture: str = "llama") -> ConfigDict:
    config = tiny.get_config(architecture)
    config.task = "tiny_grid"
    config.base.steps = 4000  # after 1,500 it plays well, but two of three words in its lessons are wrong
    config.base.batch_size = 128
    config.base.lr = 2e-3
    config.base.width, config.base.head_dim, config.base.mlp_width = 64, 16, 176

    config.rollout.max_tokens = 8  # four cells, direction, word and end token, and one more for wrong answers
    config.train.steps = 100
    config.train.batch_size = 16  # boards: a step learns from all turns of their episodes
    config.train.save_every = 100
    config.eval.every = 25
    # The number of test boards, near that of dev boards, so that one compiled program serves both.
    config.eval.batch_size = 160

    config.extract.request = "{trace}"  # the base has learnt to write lessons whenever it reads a trace
    config.extract.limit = 8  # lines: a legend has no more
    config.extract.max_tokens = 16  # two moves of four tokens, six lines, and the two ends
    config.extract.budget = 1000
    return config
