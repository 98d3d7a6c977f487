"""Export a trained arm as a Hugging Face folder: ``python -m ctxjax.export --workdir=DIR --out=FOLDER``.

transformers and vLLM open the folder. It has the weights in safetensors shards; config.json, generation config,
tokenizer and chat template of the source model; a README.md with the run's results and configuration; and export.json
with the digests of these files, for ``python -m ctxjax.audit``. A response ends at the run's end tokens: those of the
student and of its teacher. An adapter is merged into the weights, or written in PEFT's format with ``--adapter``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
import shutil
import sys
from typing import NamedTuple

import jax

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.host import command, preemption, progress, workdir as workdir_lib
from ctxjax.host.checksum import compute_checksums, hash_file
from ctxjax.host.hub import find_folder, parse_name
from ctxjax.models import lora
from ctxjax.models.hf import load as hf_load, safetensors_files, save as hf_save
from ctxjax.report.model_card import model_card
from ctxjax.training import stored_arms

# Other files of a model, copied unchanged.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
MANIFEST = "export.json"  # what was exported: arm, step, checksums of the weights, sha256 of files


class Exported(NamedTuple):
    """What was exported. ``weights``: their number type, as a person reads it."""

    arm: str
    step: int
    weights: str


def export(
    workdir: Path,
    out: Path,
    arm: str | None = None,
    step: int | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    scale: float = 1.0,
    max_shard_bytes: int = hf_save.MAX_SHARD_BYTES,
) -> Exported:
    """Write the folder ``out``.

    ``arm``: None for the only arm that has checkpoints. ``step``: None for the latest. ``dtype``: None for that of the
    trained weights, so that nothing that was trained is rounded away. ``scale`` multiplies the update of an adapter: 0
    is the base. Raises ValueError or OSError, which names what
    exists; then nothing is left at ``out``.
    """
    stored = workdir_lib.read_config(workdir)
    config = stored_arms.read_experiment(workdir)
    if adapter and config.lora is None:
        raise ValueError("--adapter: this run trained all weights (lora.rank = 0); leave --adapter out")
    if scale != 1.0 and (config.lora is None or not math.isfinite(scale)):
        raise ValueError(f"--scale={scale:g} must be a number, and lora.rank of the run above 0: it scales an adapter")
    lora_config = config.lora and dataclasses.replace(config.lora, alpha=config.lora.alpha * scale)
    arm, step = choose_checkpoint(workdir, config, arm, step)
    stop_ids = workdir_lib.read_stop_ids(workdir)
    path = stored_arms.find_source(config)
    source, (name, revision) = find_folder(path), parse_name(path)
    model = hf_load.read_config(source)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family = hf_load.find_family(fields, source)
    mesh = sharding.make_mesh(fsdp=jax.device_count())
    with workdir_lib.new_folder(out) as partial, jax.set_mesh(mesh):
        kind = config.model.param_dtype if config.lora is None else "float32"
        weights = _describe_weights(None if adapter else source, kind, dtype or kind)
        trained = stored_arms.read_trained(workdir, config, model, arm, step, mesh)
        weights += f"; the adapter's update times {scale:g}, which the results are not of" * (scale != 1.0)
        origin = {"arm": arm, "step": step, "adapter": adapter, "scale": scale, "weights": compute_checksums(trained)}
        if adapter:
            hf_save.save_adapter(partial, trained, model, lora_config, family, name, dtype, revision)
        else:
            if config.lora is not None:
                base = hf_load.load(source, model, mesh, config.model.param_dtype)
                base = stored_arms.join_first_adapter(config, base, mesh)  # run.json has the digest of both together
                stored_arms.check_source(workdir, config, base)
                trained = lora.join(base, trained, lora_config)
            hf_save.save_weights(partial, trained, model, family, dtype or kind, max_shard_bytes)
            fields = hf_save.set_dtype(fields, dtype or kind)
            hf_save.write_json(partial / "config.json", fields)
        for path in (path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()):
            shutil.copyfile(path, partial / path.name)
        _write_stop_ids(partial, stop_ids)
        card = model_card(workdir, arm, step, name, stored, adapter, weights, revision)
        (partial / "README.md").write_text(card, encoding="utf-8")
        results = workdir / "results.json"
        origin["results"] = hash_file(results) if results.exists() else None
        with progress.Bar("computing the digests of the files"):
            files = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
        hf_save.write_json(partial / MANIFEST, origin | {"files": files})
    return Exported(arm, step, weights)


def _describe_weights(source: Path | None, trained: str, written: str) -> str:
    """Name the number type of the written weights, and those of the trained ones or of the source's that differ."""
    if written != trained:
        return f"{written}, rounded from {trained}"
    stored = safetensors_files.find(source)[0].values() if source else ()
    types = sorted({safetensors_files.DTYPES[one.dtype].name for one in stored} - {written})
    return f"{written}, as trained" + (f"; the source's are {' and '.join(types)}" if types else "")


def _write_stop_ids(folder: Path, stop_ids: list[int]) -> None:
    """Let responses end at ``stop_ids``: in generation_config.json, and in config.json if that names end tokens."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        named = fields.get("eos_token_id")
        ids = set(named if isinstance(named, list) else [named]) - {None}
        if ids != set(stop_ids) and (name == "generation_config.json" or ids):
            hf_save.write_json(path, fields | {"eos_token_id": stop_ids})


def choose_checkpoint(workdir: Path, config: Experiment, arm: str | None, step: int | None) -> tuple[str, int]:
    """Return the arm and the step of a checkpoint, as ``export`` takes them. Raises ValueError that names all."""
    steps = stored_arms.list_steps(workdir, config)
    saved = stored_arms.describe_steps(workdir, steps)
    if arm is None:
        found = [name for name in steps if steps[name]]
        if len(found) != 1:
            raise ValueError(f"give an arm with --arm; {saved}")
        arm = found[0]
    if not steps.get(arm):
        raise ValueError(f"--arm={arm}: {saved}")
    step = steps[arm][-1] if step is None else step
    if step not in steps[arm]:
        raise ValueError(f"--step={step}: {saved}")
    return arm, step


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``choose_checkpoint`` takes, and the run's folder."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--arm", help="arm; default: the only one that has checkpoints")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the latest")


def main(arguments: list[str] | None = None) -> int:
    """Export and print the folder's name. Return 0, or 2 after one line on stderr if it fails."""
    parser = argparse.ArgumentParser(
        prog="ctxjax export",
        description="Export a trained arm as a Hugging Face folder.",
        epilog="example: ctxjax export --workdir=runs/tiny --arm=opcd_anchored --out=my-model",
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--adapter", action="store_true", help="write only the adapter, in PEFT's format")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of an adapter's update; 0: the base; default: 1, as trained"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as trained, which is float32"
    )
    options = parser.parse_args(arguments)

    def run() -> None:
        workdir, out = command.parse_folder("--workdir", options.workdir), command.parse_folder("--out", options.out)
        done = export(workdir, out, options.arm, options.step, options.adapter, options.dtype, options.scale)
        hint = " (--dtype=bfloat16 halves the folder, and rounds small updates away)" * ("source's" in done.weights)
        print(f"{out}: {done.arm}, step {done.step}; weights: {done.weights}{hint}")

    remedy = "export in the host's memory: JAX_PLATFORMS=cpu python -m ctxjax.export ..."
    return command.end_readably(run, remedy)


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
