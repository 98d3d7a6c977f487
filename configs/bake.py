"""A prompt and nothing else: the model writes the questions itself, and the prompt goes into its weights.

    python -m ctxjax.main --config=configs/bake.py --config.model.path=MODEL \\
      --config.self_study.context_file=prompt.txt --workdir=runs/mine

The questions are kept, and their file is printed: read it. Accuracy is agreement with the model's own replies with the
prompt; ``distill`` and ``trace_gap`` (held out, nats per token) fall if the prompt goes in, and ``drift`` rises if
the model changes without the prompt, too. The rates are for models of billions of
parameters with all weights trained; for small ones (SmolLM2-135M) set optim.lr=2e-4, for an adapter lora.rank=16 and
optim.lr=1e-3. A prompt with facts that the model cannot guess: loss.off_policy_steps=40 and
loss.off_policy_divergence=forward_kl.
With questions of your own: ``--config.task=qa_jsonl`` (docs/data.md).
"""

from ml_collections import ConfigDict

from ctxjax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "self_study"
    config.self_study.questions = 512
    config.self_study.dev_questions = 48
    config.self_study.test_questions = 100
    config.model.remat = "dots"
    config.rollout.max_tokens = 128
    config.optim.lr = 1e-5
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 5
    config.train.steps = 100
    config.train.batch_size = 32
    config.eval.batch_size = 64
    config.eval.every = 25
    config.eval.select = "-distill"  # needs no reference
    config.eval.meters = ("trace_gap", "drift")  # nor do they
    config.run_arms = ("opcd", "opcd_retained")
    return config
