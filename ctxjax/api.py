"""The Python API: train, load a model folder, compute logits, generate responses. The same core as the commands.

results = ctxjax.train(config, "runs/mine")                # {"base": {"acc_x": 0.0, ...}, "opcd": {"harm": 0.5, ...}}
model = ctxjax.load_model("~/.cache/ctxjax/rules-base-...")
ctxjax.generate(model, ["#2:fac"], context="f>b;a>e;c>d;b>a;e>f;d>c;", max_tokens=19)   # ["s1 bed s2 afc"]
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctxjax import config as config_lib, rng, sharding
from ctxjax.data import prompts as prompts_lib, responses
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.host import command, processes, workdir as workdir_lib
from ctxjax.inputs import decoding, run_inputs
from ctxjax.inputs.model_folder import ModelFolder, open_folder
from ctxjax.models import transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params


def train(config: ConfigDict, workdir: str | Path, resume: str = "auto") -> dict[str, dict]:
    """Train and evaluate every arm, as ``python -m ctxjax.main`` does; return what results.json holds.

    ``config``: the fields of configs/base.py. ``workdir``: folder for results, report, metrics and checkpoints.
    ``resume``: "auto" resumes the run in ``workdir``, if there is one; "never" refuses it; "must" requires it.

    The result has a dict for each model: "base", "teacher" if it is another model, and the arms. Rates, such as
    ``acc_x``, ``acc_xc`` and ``harm``, are between 0 and 1, and have a 95 % interval [low, high] in ``harm_ci`` and so
    on; ``harm`` is None if nothing was right without the context.

    Logs of libraries are switched off, and config.compile_cache is used from now on. config.cpu_devices has no effect
    if JAX uses devices already. Raises ValueError or OSError with the remedy, and StopRun if an alarm ends the run.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"config = {config!r} is not a ConfigDict; get one from configs, such as tiny.get_config()")
    place = command.parse_folder("workdir", str(workdir))
    command.prepare(config)
    return start_run(config, place, resume, command="ctxjax.train(config, workdir)")


def start_run(config: ConfigDict, workdir: Path, resume: str, **facts) -> dict[str, dict]:
    """Check configuration and folder, then run; ``facts`` replace those that workdir.collect_facts finds."""
    from ctxjax.training import run  # imports the report's plots, which other functions do not need

    facts = workdir_lib.collect_facts(config) | facts
    if jax.process_count() > 1:
        processes.check_same_facts({name: facts[name] for name in ("config", "versions", "commit")})
        processes.silence_others()
    experiment = config_lib.experiment(config, jax.device_count())
    workdir_lib.check_workdir(workdir, facts["config"], resume, run_inputs.MOVABLE)
    return run.run(experiment, workdir, facts)


def load_model(
    folder: str, mesh: Mesh | None = None, dtype: str = "float32", param_dtype: str = "float32"
) -> ModelFolder:
    """Load a model; the result has ``.config``, ``.params`` (a nested dict of arrays) and ``.tokenizer``.

    ``folder``: a Hugging Face folder, or a Hub id ``org/name`` or ``org/name@revision``. ``mesh``: by default all
    devices along "fsdp". Raises FileNotFoundError or ValueError with the remedy.
    """
    mesh = sharding.make_mesh(fsdp=jax.device_count()) if mesh is None else mesh
    return open_folder(folder, mesh, dtype, param_dtype)


def get_mesh(params: Params) -> Mesh:
    """Return the mesh of a parameter tree."""
    return jax.tree.leaves(params)[0].sharding.mesh


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, config, tokens_BxL, mask_BxL):
    hidden_BxLxD = transformer.forward(params, config, tokens_BxL, mask_BxL)
    raw_BxLxV = transformer.apply_head(hidden_BxLxD, transformer.head_weights(params, config))
    return jax.reshard(transformer.finish_logits(raw_BxLxV, config), jax.P())


def logits(params: Params, config: ModelConfig, tokens_BxL, mask_BxL) -> jax.Array:
    """Compute next-token logits, float32 [B, L, V], replicated on every device. Column l predicts token l+1.

    ``tokens_BxL``: int array-like, left-padded. ``mask_BxL``: bool array-like, True for a real token. Raises ValueError
    if B is not divisible by data * fsdp of the mesh.
    """
    mesh = get_mesh(params)
    with jax.set_mesh(mesh):
        return _logits(params, config, *sharding.put_batch((tokens_BxL, mask_BxL), mesh))


def generate(
    model: ModelFolder,
    questions: list[str],
    context: str | None = None,
    *,
    params: Params | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    placement: str = "system",
    thinking: bool | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Generate responses to ``questions``, with ``context`` or, if it is None, without a context.

    ``params``: used in place of the folder's parameters, for example those of a trained student. ``temperature`` 0 is
    greedy. The randomness of row i depends only on (seed, i). In a question or a context, control tokens such as
    <|im_end|> are read as text; responses are returned without them. ``placement``, ``thinking``: see
    prompts.PromptConfig. Raises ValueError if a prompt and its response have more tokens than the model has positions,
    or if ``thinking`` is set and the chat template has no such switch.
    """
    rows = [Row(str(index), question, context, "") for index, question in enumerate(questions)]
    if not rows:
        return []
    params = model.params if params is None else params
    tokens = prompts_lib.encode(model.tokenizer, rows, PromptConfig(placement=placement, thinking=thinking))
    model.check_prompts(tokens, max_tokens, "max_tokens")
    prompts = decoding.pad_prompts(tokens, model.pad_id)
    sampling = SamplingConfig(max_tokens, model.stop_ids, model.pad_id, temperature, top_k, top_p)
    mesh = get_mesh(params)
    ways = sharding.batch_ways(mesh)
    batch_size = -(-min(batch_size, len(rows)) // ways) * ways
    with jax.set_mesh(mesh):
        key = rng.key_for(jax.random.key(seed), 0, "evaluation")
        rollout = decoding.decode(params, model.config, sampling, prompts, key, batch_size, mesh)
    kept = [ids[mask] for ids, mask in zip(rollout.tokens_BxT, rollout.mask_BxT)]
    return responses.decode(model.tokenizer, kept, model.stop_ids)
