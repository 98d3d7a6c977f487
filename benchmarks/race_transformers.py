"""The same step in PyTorch with transformers, written out, in benchmarks/race.py."""

from __future__ import annotations

import json
from pathlib import Path
import resource
import statistics
import sys
import time

STARTED = time.perf_counter()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token ids, mask), [B, P]."""
    size = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (size - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def response_logits(model, prompts, response: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of the response's tokens, [B, T, V]; the head reads no other column."""
    ids, mask = torch.cat([prompts[0], response], 1), torch.cat([prompts[1], response_mask], 1)
    size = response.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=size + 1).logits[:, :-1]


def race(task: dict) -> dict:
    rows = json.loads(Path(task["rows"]).read_text())
    student, teacher = (AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32) for _ in range(2))
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rows["lr"], weight_decay=0.0)
    stops = torch.tensor(rows["stop_ids"])
    seconds = {"rollout": [], "update": [], "step": []}
    result, tokens = {"document_tokens": rows["document_tokens"]}, []
    for bare, context in zip(rows["bare"], rows["context"]):
        bare, context = pad_left(bare, rows["pad_id"]), pad_left(context, rows["pad_id"])
        start = time.perf_counter()
        with torch.inference_mode():
            out = student.generate(
                input_ids=bare[0], attention_mask=bare[1], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=task["new"], eos_token_id=rows["stop_ids"], pad_token_id=rows["pad_id"],
            )  # fmt: skip
        response = out[:, bare[0].shape[1] :].clone()
        is_stop = torch.isin(response, stops)
        mask = ((is_stop.cumsum(1) - is_stop.long()) == 0).long()  # up to and with the first end token
        sampled = time.perf_counter()
        with torch.no_grad():
            target = torch.log_softmax(response_logits(teacher, context, response, mask), -1)
        own = torch.log_softmax(response_logits(student, bare, response, mask), -1)
        kl = (own.exp() * (own - target)).sum(-1)
        loss = (kl * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        end = time.perf_counter()
        result.setdefault("first", end - STARTED)
        tokens.append(mask.sum().item())
        for name, value in (("rollout", sampled - start), ("update", end - sampled), ("step", end - start)):
            seconds[name].append(value)
    result |= {name: statistics.median(values[1:]) for name, values in seconds.items()}
    result["tokens"] = statistics.mean(tokens[1:])
    return result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


if __name__ == "__main__":
    print(json.dumps(race(json.loads(sys.argv[1]))))
