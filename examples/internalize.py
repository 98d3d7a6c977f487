"""Bake your own system prompt into your own model with your own questions, from Python. In a clone of ctxjax:

python -m examples.internalize --model=/models/my-llama --prompt=prompt.txt --questions=questions.jsonl --out=runs/mine

Every line of the questions is an object such as {"question": "How many legs has a hen?", "answer": "2"}. A model of
billions of parameters wants a lower rate (5e-6 for all weights), and a GPU or TPU.
"""

import argparse

import ctxjax
from ctxjax.configs import base

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "prompt", "questions", "out"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch_size", type=int, default=32)
options = parser.parse_args()

config = base.get_config()  # configs/base.py lists every field with its unit
config.model.path = options.model
config.qa_jsonl.path, config.qa_jsonl.context_file = options.questions, options.prompt
config.qa_jsonl.grading = "short"  # an answer in some words or a sentence; or "numeric", "letter", "exact"
config.lora.rank, config.optim.lr = 16, 1e-3  # an adapter; 0: all weights
config.rollout.max_tokens = 64
config.train.steps, config.train.batch_size, config.eval.batch_size = options.steps, options.batch_size, 64
config.run_arms = ("opcd", "opcd_anchored", "opcd_retained")

results = ctxjax.train(config, options.out)  # goes on with the run in this folder, if it was interrupted
for arm, metrics in results.items():
    print(f"{arm}: right without the prompt {metrics['acc_x']:.1%}, with it {metrics['acc_xc']:.1%}")
print(f"read {options.out}/report.html, then talk to it: python -m ctxjax.chat --workdir={options.out}")
