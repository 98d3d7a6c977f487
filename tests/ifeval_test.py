"""IF-Eval by lm-evaluation-harness on a folder of ours, by the command of docs/serving.md, with a local copy of the
task's file. Skips unless the extra "ifeval" is installed."""

import json
import os
from pathlib import Path
import string
import subprocess
import sys

import jax
import pytest

from ctxjax import sharding
from ctxjax.data.worlds import word_tokenizer
from ctxjax.models import params as params_lib
from ctxjax.models.hf import save as hf_save
from ctxjax.models.transformer import ModelConfig, param_specs

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval", reason="the extra ifeval is not installed")

# The layout of google/IFEval: an unknown argument of an instruction is null.
ROWS = [
    {
        "key": 1, "prompt": "Say something without commas.", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"keyword": None}],
    },
    {
        "key": 2, "prompt": "Answer in more than 300 words, with a title.",
        "instruction_id_list": ["detectable_format:title", "length_constraints:number_words"],
        "kwargs": [{"relation": None}, {"relation": "at least", "num_words": 300}],
    },
]  # fmt: skip
LOCAL = """include: {original}
task: ifeval_local
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
"""


def test_an_exported_folder_is_evaluated_without_and_with_a_context(tmp_path):
    tokenizer = word_tokenizer.build([*string.printable[:95], "\n"], r"[\s\S]")
    model = ModelConfig(len(tokenizer), width=16, layers=1, query_heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    mesh = sharding.make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        params = params_lib.init(param_specs(model), jax.random.key(0), mesh)
    hf_save.save(tmp_path / "model", params, model, tokenizer, (tokenizer.eos_token_id,), "llama")
    data = tmp_path / "input_data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    original = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ifeval_local.yaml").write_text(LOCAL.format(original=original, data=data))
    for view, more in (("bare", []), ("context", ["--system_instruction", "Never use a comma."])):
        line = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
        line += [f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks", "ifeval_local", "--apply_chat_template"]
        line += ["--include_path", str(tmp_path / "tasks"), "--gen_kwargs", "max_gen_toks=8", "--device", "cpu"]
        line += ["--output_path", str(tmp_path / view), "--log_samples", *more]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        del env["PYTHONPATH"]  # it hides torch, see conftest.py
        result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        (written,) = (tmp_path / view).rglob("results_*.json")
        scores = json.loads(written.read_text())["results"]["ifeval_local"]
        # Eight random letters: no title, no 300 words; a comma is possible, and not seen with this seed.
        assert scores["inst_level_strict_acc,none"] == pytest.approx(1 / 3)
        assert scores["prompt_level_strict_acc,none"] == pytest.approx(1 / 2)
        (samples,) = (tmp_path / view).rglob("samples_*.jsonl")
        asked = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
        assert asked.startswith("<|begin|>") and asked.endswith("<|assistant|>")
        assert ("<|system|>Never use a comma.<|end|>" in asked) == (view == "context")
