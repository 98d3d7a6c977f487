"""Show which tokens of a response depend on the context: python -m examples.view_kl MODEL "QUESTION" "CONTEXT"

The model answers with the context and without it. Along the answer without it, KL(q_x || q_c) in nats says how much the
context changes the distribution of the next token: 0 means that the model does not hear it.
"""

import sys

import jax
import numpy as np

import ctxjax

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, question, context = sys.argv[1:]
model = ctxjax.load_model(folder)
(bare,), (told,) = (ctxjax.generate(model, [question], shown, max_tokens=32) for shown in (None, context))
print(f"without the context: {bare}\nwith the context:    {told}\n")

user, system = {"role": "user", "content": question}, {"role": "system", "content": context}
encode = model.tokenizer.apply_chat_template
prompts = [encode(chat, add_generation_prompt=True, return_dict=False) for chat in ([user], [system, user])]
response = model.tokenizer(bare, add_special_tokens=False)["input_ids"]
rows = [prompt + response for prompt in prompts] * jax.device_count()  # the rows are shared out among the devices
columns = max(map(len, rows))
tokens = np.array([[model.pad_id] * (columns - len(row)) + row for row in rows])
mask = np.array([[False] * (columns - len(row)) + [True] * len(row) for row in rows])

logits = ctxjax.logits(model.params, model.config, tokens, mask)[:2, -len(response) - 1 : -1]
q_x, q_c = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
for token, kl in zip(response, np.sum(np.exp(q_x) * (q_x - q_c), axis=-1)):
    print(f"{kl:8.3f}  {model.tokenizer.decode([token])!r}")
