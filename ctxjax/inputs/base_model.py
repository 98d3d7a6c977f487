"""Train a base model from scratch and write it as an ordinary Hugging Face folder.

A world (data.task.World) provides the tokenizer and the training rows; the procedure is the same for all worlds. The
run loads the folder exactly as it would load Llama or Qwen. The folder's name contains a hash of everything that
determines the base, so the base is trained again only if one of these changes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path

import grain
import jax
from jax.sharding import Mesh
import numpy as np
import optax

from ctxjax import rng, sharding
from ctxjax.config_sections import BaseConfig
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import PretrainingRow, Row, World
from ctxjax.distill import objective, optim
from ctxjax.distill.optim import OptimConfig
from ctxjax.host import processes, progress, workdir as workdir_lib
from ctxjax.models import mesh_check, params as params_lib, transformer
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, Prompts, Rollout

# Part of the hash: increase it when the training text or the procedure changes.
RECIPE = 1


def find_base_folder(config: BaseConfig, name: str, world: World) -> Path:
    """Return the folder of this configuration's base, which need not exist yet. ``name``: the task's name."""
    facts = dataclasses.asdict(config) | world.pretraining_facts() | {"recipe": RECIPE}
    facts |= {"weights": repr(transformer.param_specs(make_model_config(config, 1)))}
    del facts["cache"], facts["family"]  # the weights tell families apart
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.cache).expanduser() / f"{name}-base-{digest}"


def ensure_base(config: BaseConfig, name: str, world: World, mesh: Mesh) -> Path:
    """Return the base's folder; train the base first if the cache does not have it.

    Raises ValueError if only some of several processes see the folder: all must load the same weights, and two
    trainings may differ in their last bits.
    """
    folder = find_base_folder(config, name, world)
    if processes.ask_all(not folder.exists()):
        train_base(config, world, mesh, folder)
    elif not processes.ask_all(folder.exists()):
        raise ValueError(
            f"{folder} exists on some hosts only; copy it to all, or set config.base.cache to a shared folder"
        )
    return folder


def make_model_config(config: BaseConfig, vocab_size: int) -> ModelConfig:
    """Return the architecture of a base with ``vocab_size`` tokens."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp_width=config.mlp_width,
        rope_theta=config.rope_theta,
        **hf_load.FAMILIES[config.family].parts,
    )


def train_base(config: BaseConfig, world: World, mesh: Mesh, folder: Path) -> None:
    """Train next-token prediction on the world's text, on the responses only, and write a Hugging Face folder.

    Raises ValueError if the loss is not finite, and OSError, before training, if the folder cannot be written.
    """
    if processes.is_first():
        workdir_lib.ensure_writable(folder.parent, "base.cache or teacher_base.cache")
    tokenizer = world.tokenizer()
    model = make_model_config(config, len(tokenizer))
    mesh_check.check_model_fits_mesh(model, mesh, "config.base")
    optimizer = OptimConfig(
        lr=config.lr, steps=config.steps, schedule="cosine", warmup_steps=config.warmup_steps, b2=0.98,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    with progress.Bar("initialising the base model"):
        key = rng.key_for(jax.random.key(config.seed), 0, "init")
        params = params_lib.init(transformer.param_specs(model), key, mesh)
        opt_state = jax.jit(optim.optimizer(optimizer).init)(params)
    with progress.Bar("base model from scratch", config.steps, compiles=True) as bar:
        for step, (prompts, responses) in enumerate(_make_batches(config, world, tokenizer), start=1):
            prompts, responses = sharding.put_batch((prompts, responses), mesh)
            params, opt_state, loss = _update(params, opt_state, prompts, responses, model, optimizer)
            if step % 50 == 0 or step == config.steps:
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss of the model from scratch is {loss} at step {step}; lower its lr = {config.lr} "
                        "(base.lr or teacher_base.lr)"
                    )
                bar.set_postfix(loss=f"{float(loss):.3f}")
            bar.update()
    _save(folder, sharding.to_host(params), model, tokenizer, config.family)


def _save(folder: Path, params: Params, model: ModelConfig, tokenizer, family: str) -> None:
    """Write the folder: first by the first process, then by the others if they do not share its disk."""
    for is_writer in (processes.is_first(), not processes.is_first()):
        if is_writer and not folder.exists():
            try:
                hf_save.save(folder, params, model, tokenizer, (tokenizer.eos_token_id,), family)
            except OSError:
                if not folder.exists():  # otherwise another run has just written the same folder
                    raise
        processes.wait("base model written")


@functools.partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames=("params", "opt_state"))
def _update(params, opt_state, prompts: Prompts, responses: Rollout, model: ModelConfig, optimizer: OptimConfig):
    def loss_of(params):
        return objective.next_token_loss(params, model, prompts, responses, chunk=128)

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optim.optimizer(optimizer, _rise_and_decay(optimizer)).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def _rise_and_decay(config: OptimConfig) -> optax.Schedule:
    """Return the base's learning rate: 0 in the first step, ``lr`` after the warm-up, and 0 at the end.

    Not the schedule of an arm, whose first step has a rate: it would make other bases of the same RECIPE.
    """
    warmup = config.warmup_steps
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(config.steps, warmup + 1))


def _make_batches(config: BaseConfig, world: World, tokenizer):
    """Return host batches (prompts, responses as a Rollout). A row is a pure function of (seed, row number)."""

    def encode_prompts(drawn: list[PretrainingRow]) -> list[list[int]]:
        rows = [Row("", question, context, "") for question, context, _ in drawn]
        return prompts_lib.encode(tokenizer, rows, PromptConfig())

    def encode_responses(drawn: list[PretrainingRow]) -> list[list[int]]:
        answers = tokenizer([text for _, _, text in drawn], add_special_tokens=False)["input_ids"]
        return [[*ids, tokenizer.eos_token_id] for ids in answers]

    longest = [world.longest_pretraining_row()]
    columns, responses = len(encode_prompts(longest)[0]), len(encode_responses(longest)[0])

    def collate(numbers) -> tuple[Prompts, Rollout]:
        drawn = [world.pretraining_row(np.random.default_rng([config.seed, 3, int(number)])) for number in numbers]
        prompts = prompts_lib.left_pad(encode_prompts(drawn), columns, tokenizer.pad_token_id)
        tokens = np.full((len(drawn), responses), tokenizer.pad_token_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(encode_responses(drawn)):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return prompts, Rollout(tokens, mask, np.zeros(tokens.shape, np.float32))

    numbers = grain.MapDataset.range(config.steps * config.batch_size)
    batches = numbers.batch(config.batch_size, batch_fn=collate)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
