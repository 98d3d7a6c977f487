"""Bad inputs by the table: each ends the command with code 2 and one message that names it, and changes no file.

They run in this process, up to and including the command's own end; a handful run as commands in bad_input_test.py.
"""

import json
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

from absl import flags
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax import main, sharding
from ctxjax.configs import tiny
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.host import progress, workdir
from ctxjax.models import params as params_lib
from ctxjax.models.hf import save as hf_save
from ctxjax.models.transformer import ModelConfig, param_specs

GOOD = b"".join(json.dumps({"question": f"#1:{a}{b}", "answer": a}).encode() + b"\n" for a in "abcdef" for b in "abc")


class Scene:
    """A folder with a good model, good data, a context, and a configuration that reads them; a case spoils one."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.workdir, self.model = folder, folder / "run", folder / "model"
        shutil.copytree(model, self.model)
        self.config = tiny.get_config()
        self.config.model.path, self.config.task, self.config.compile_cache = str(self.model), "qa_jsonl", ""
        self.config.qa_jsonl.path, self.config.qa_jsonl.context = str(folder / "rows.jsonl"), "a>b;"
        self.config.qa_jsonl.dev_questions = self.config.qa_jsonl.test_questions = 4
        self.config.qa_jsonl.grading = "exact"
        (folder / "rows.jsonl").write_bytes(GOOD)

    def rows(self, content: bytes, name: str = "rows.jsonl") -> None:
        (self.folder / name).write_bytes(content)
        self.config.qa_jsonl.path = str(self.folder / name)

    def context(self, content: bytes | None, field: str = "context_file") -> None:
        path = self.folder / "context.jsonl"
        if content is not None:
            path.write_bytes(content)
        if field == "context_file":
            self.config.qa_jsonl.context = ""
        self.config.qa_jsonl[field] = str(path)

    def json(self, name: str, **changes) -> None:
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self, change) -> None:
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors")

    def index(self, file: str) -> None:
        (self.model / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": file}}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index))


def setting(**changes):
    """A case that sets fields; "__" stands for the point."""

    def spoil(scene: Scene) -> None:
        tree = scene.config.to_dict()
        for name, value in changes.items():
            *sections, field = name.split("__")
            inner = tree
            for section in sections:
                inner = inner[section]
            inner[field] = value
        scene.config = type(scene.config)(tree)

    return spoil


def calls(method: str, *arguments, **options):
    return lambda scene: getattr(scene, method)(*arguments, **options)


def written(name: str, content: bytes):
    return lambda scene: (scene.folder / name).parent.mkdir(exist_ok=True) or (scene.folder / name).write_bytes(content)


def removed(*names: str):
    return lambda scene: [(scene.model / name).unlink() for name in names]


def poisoned(name: str):
    return calls("tensors", lambda tensors: tensors[name].flat.__setitem__(0, np.nan))


ROW = b'{"question": "q", "answer": "a"}\n'
CASES = {
    # --- the configuration ---
    "unknown task": (setting(task="chess"), "task = 'chess' is not known"),
    "a keyword without a value": (setting(prompt__keywords=("low",)), "keywords: 'low' must be NAME=VALUE"),
    "a keyword with a field of its own": (
        setting(prompt__teacher_keywords=("enable_thinking=true",)),
        "since prompt.thinking or .* sets enable_thinking",
    ),
    "a switch that the template lacks": (setting(prompt__teacher_thinking=True), "does not read enable_thinking"),
    "another treatment of reasoning": (setting(teacher__reasoning="drop"), "teacher.reasoning = 'drop' is not known"),
    "distributions of an answer without its reasoning": (
        setting(teacher__reasoning="cut", loss__off_policy_steps=1),
        "compares with the teacher's distributions",
    ),
    "tokens that a loss without distributions cannot sum over": (
        setting(loss__off_policy_divergence="cross_entropy", loss__off_policy_steps=1, loss__support="student_top_k"),
        "off_policy_divergence = 'cross_entropy' compares no distributions, and loss.support = student_top_k",
    ),
    "an adapter and all weights trained": (setting(lora__init="/adapter"), "lora.init = '/adapter' and lora.rank = 0"),
    "no adapter": (setting(lora__init="/adapter", lora__rank=2), "/adapter has no adapter_config.json; give a folder"),
    "drift of style": (
        setting(task="style", eval__meters=("drift",), model__path="x"),
        "drift asks the everyday questions that task = 'st",
    ),
    "another meter": (setting(eval__meters=("speed",)), "eval.meters = 'speed' is not known; choose from drift, trace"),
    "a meter that cannot be asked": (
        setting(eval__meters=("drift",)),
        "the tokens of this model cannot write",
    ),
    "no steps": (setting(train__steps=0), "train.steps = 0 must be above 0"),
    "negative steps": (setting(train__steps=-1), "train.steps = -1 must be above 0"),
    "steps as text": (setting(train__steps="3"), "train.steps = '3' must be a whole number"),
    "steps with a point": (setting(train__steps=3.0), "train.steps = 3.0 must be a whole number"),
    "batch off the mesh": (setting(train__batch_size=12), "train.batch_size = 12 is not divisible"),
    "absurd batch": (setting(train__batch_size=10**12), "train.batch_size = 1000000000000 must be at most"),
    "micro-batches": (setting(train__micro_batches=3), "does not split into train.micro_batches = 3 parts"),
    "retention rows": (setting(train__retention_rows=64), "train.retention_rows = 64 is more than"),
    "no temperature": (setting(rollout__temperature=0.0), "rollout.temperature = 0.0 must be above 0"),
    "nan temperature": (setting(rollout__temperature=float("nan")), "rollout.temperature = nan must be finite"),
    "top_p above 1": (setting(rollout__top_p=1.5), "rollout.top_p = 1.5 must be at most 1"),
    "no tokens": (setting(rollout__max_tokens=0), "rollout.max_tokens = 0 must be above 0"),
    "negative rate": (setting(optim__lr=-1e-3), "optim.lr = -0.001 must be 0 or more"),
    "infinite rate": (setting(optim__lr=float("inf")), "optim.lr = inf must be finite"),
    "absurd rate": (setting(optim__lr=50.0), "optim.lr = 50.0 must be at most 1"),
    "rate in words": (setting(optim__lr="fast"), "optim.lr = 'fast' must be a number"),
    "schedule": (setting(optim__schedule="linear"), "optim.schedule = 'linear' is not known"),
    "divergence": (setting(loss__divergence="js"), "loss.divergence = 'js' is not known"),
    "alpha": (setting(loss__alpha=1.5), "loss.alpha = 1.5 must be below 1"),
    "all tokens skipped": (setting(loss__skip_first=99), "loss.skip_first = 99 must be below rollout.max_tokens"),
    "masked ids as text": (setting(loss__masked_ids="3"), "loss.masked_ids = '3' must be a list of values"),
    "negative rank": (setting(lora__rank=-1), "lora.rank = -1 must be 0 or more"),
    "targets as text": (setting(lora__targets="q"), "lora.targets = 'q' must be a list of values"),
    "unknown target": (setting(lora__targets=("head",)), "lora.targets = 'head' is not known"),
    "mesh too large": (setting(mesh__tensor=3), "there are 8"),
    "mesh of nothing": (setting(mesh__data=0), "mesh = "),
    "placement": (setting(prompt__placement="suffix"), "prompt.placement = 'suffix' is not known"),
    "date": (setting(prompt__date="today"), "prompt.date = 'today' is not a date"),
    "overlong": (setting(prompt__overlong="cut"), "prompt.overlong = 'cut' is not known"),
    "dtype": (setting(model__dtype="float16"), "model.dtype = 'float16' is not known"),
    "no arm": (setting(run_arms=()), "run_arms is empty"),
    "unknown arm": (setting(run_arms=("nca",)), "run_arms = 'nca' is not known"),
    "arm outside": (setting(run_arms=("/tmp/x",), **{"arms__/tmp/x": {}}), "'/tmp/x' names a folder of the workdir"),
    "arm's field": (setting(arms__opcd={"betta": 0.5}), "arms.opcd.betta is no field"),
    "unknown alarm": (setting(alarms__stop=("fire",)), "alarms.stop = 'fire' is not known"),
    "unknown kind of row": (setting(records__skip=("odd",)), "records.skip = 'odd' is not known"),
    "evaluation off the mesh": (setting(eval__batch_size=7), "eval.batch_size = 7 is not divisible"),
    "loss of no arm": (
        setting(loss__beta=0.3),
        r"loss.beta = 0.3 has no effect: every arm of run_arms .*\(arms.opcd.beta = 0.0, .*; set these instead",
    ),
    "negative seed": (setting(seed=-1), "seed = -1 must be 0 or more"),
    "large seed": (setting(seed=2**40), "seed = 1099511627776 must be at most"),
    "no model": (setting(model__path=""), "model.path is empty; give the folder or the Hub id"),
    "section missing": (setting(train=3), "train = 3 must be a section"),
    # --- data ---
    "no data": (setting(qa_jsonl__path=""), "data file '' does not exist; set qa_jsonl.path"),
    "data missing": (setting(qa_jsonl__path="none.jsonl"), "data file 'none.jsonl' does not exist"),
    "data is a folder": (setting(qa_jsonl__path="/tmp"), "data file '/tmp' does not exist"),
    "unknown ending": (calls("rows", GOOD, "rows.xlsx"), "'.xlsx' is not known; set qa_jsonl.path"),
    "empty data": (calls("rows", b"\n"), "has no rows"),
    "broken JSON": (calls("rows", GOOD + b'{"question": \n' + ROW), "line 19: not valid JSON"),
    "torn last line": (calls("rows", GOOD + b'{"question": "x'), "line 19: not valid JSON: .*is it complete?"),
    "not UTF-8": (calls("rows", GOOD + b'{"question": "\xff", "answer": "1"}\n'), "line 19: not UTF-8 text"),
    "half a surrogate": (calls("rows", rb'{"question": "\ud800", "answer": "1"}' + b"\n"), "line 1: .* valid Unicode"),
    "half a surrogate in a chat": (
        lambda scene: (
            scene.rows(
                rb'{"chat": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}, '
                rb'{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}' + b"\n"
            ),
            setting(qa_jsonl__messages="chat")(scene),
        ),
        "line 1: no message in column 'chat' that is valid Unicode",
    ),
    "null": (calls("rows", GOOD + b'{"question": null, "answer": "1"}\n'), "line 19: no text in column 'question'"),
    "no column": (calls("rows", b'{"q": "x", "answer": "1"}\n'), r"its columns are \['answer', 'q'\]"),
    "a number": (calls("rows", b'{"question": 1, "answer": "x"}\n'), "no text in column 'question', but int 1"),
    "a list for an answer": (calls("rows", b'{"question": "x", "answer": [1]}\n'), "no reference in column 'answer'"),
    "no reference": (
        lambda scene: (scene.rows(ROW), setting(qa_jsonl__grading="numeric")(scene)),
        "line 1: column 'answer': 'a' cannot be a reference; give a number",
    ),
    "a list for a row": (calls("rows", b"[1]\n"), "line 1: .*the row is not an object"),
    "10 MB": (calls("rows", b'{"question": "' + b"x" * 10**7 + b'", "answer": "1"}\n'), "more than records.max_text"),
    "conflict": (
        calls("rows", ROW + b'{"question": "q", "answer": "b"}\n'),
        "the same as line 1, with another",
    ),
    "no duplicates": (
        lambda scene: (scene.rows(ROW + ROW), setting(records__skip=())(scene)),
        "line 2: the same as line 1",
    ),
    "too many bad rows": (
        lambda scene: (scene.rows(b"[]\n" * 3), setting(records__max_skipped=1, records__skip=("not_text",))(scene)),
        "2 rows are left out",
    ),
    "CSV of other width": (calls("rows", b"question,answer\nx,1,2\n", "a.csv"), "line 2: not valid CSV: 3 fields"),
    "CSV torn": (calls("rows", b'question,answer\n"x,1\n', "a.csv"), "line 2: not valid CSV"),
    "not Parquet": (calls("rows", b"PAR1", "a.parquet"), "a.parquet cannot be read"),
    "too few questions": (setting(qa_jsonl__test_questions=99), "has 18 different questions, and"),
    "no context": (setting(qa_jsonl__context=""), "qa_jsonl has no context"),
    "two contexts": (setting(qa_jsonl__context_file="c.txt"), "are both set"),
    "context missing": (calls("context", None), "context file .*context.jsonl does not exist"),
    "context empty": (calls("context", b" \n"), "is empty; the teacher would see no context"),
    "context not text": (calls("context", b"\xff\xfe"), "is not UTF-8 text"),
    "others missing": (
        calls("context", None, "other_contexts_file"),
        "exist; set qa_jsonl.other_contexts_file",
    ),
    "one other": (calls("context", b'"b>a;"\n', "other_contexts_file"), "has 1 contexts: too few .* at least four"),
    "others have the own": (
        calls("context", b'"a>b;"\n"b>a;"\n', "other_contexts_file"),
        "line 1: .*the context to internalize",
    ),
    # --- the model ---
    "model missing": (setting(model__path="missing"), "model folder missing does not exist; give a folder"),
    "teacher missing": (setting(teacher__path="missing"), "model folder missing does not exist"),
    "no config.json": (removed("config.json"), "config.json does not exist"),
    "config.json is no JSON": (written("model/config.json", b"{"), "config.json is not valid JSON"),
    "unknown family": (calls("json", "config.json", model_type="mamba"), "model_type = 'mamba' is not supported"),
    "unknown field": (calls("json", "config.json", swizzle=True), "config.json: .*swizzle"),
    "other width": (calls("json", "config.json", intermediate_size=24), "wrong shape: model.layers.0.mlp"),
    "weights missing": (removed("model.safetensors"), "has neither model.safetensors nor its index"),
    "pickled weights": (
        lambda scene: (removed("model.safetensors")(scene), written("model/pytorch_model.bin", b"x")(scene)),
        "pickled weights are not read: convert them to safetensors",
    ),
    "weights cut off": (written("model/model.safetensors", b"\x08\0\0\0\0\0\0\0{"), "not a readable safetensors file"),
    "a tensor missing": (calls("tensors", lambda t: t.pop("model.norm.weight")), "missing: model.norm.weight"),
    "a tensor too many": (calls("tensors", lambda t: t.update(x=np.zeros(2))), "unexpected: x"),
    "weights not finite": (poisoned("model.norm.weight"), "not finite numbers; .*\n  model.norm.weight"),
    "index points outside": (
        calls("index", "../other.safetensors"),
        r"it must name a \*.safetensors file in its folder",
    ),
    "index names no file": (calls("index", "gone.safetensors"), "index.json names files that do not exist"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "tokenizer is no JSON": (written("model/tokenizer.json", b"{"), "the tokenizer in .* cannot be read"),
    "head too small": (calls("json", "config.json", vocab_size=5), "wrong shape|but the head only 5 rows"),
    "end beyond the head": (calls("json", "generation_config.json", eos_token_id=999), "fix eos_token_id"),
    "end is no id": (calls("json", "generation_config.json", eos_token_id="</s>"), "must be an id or a list of ids"),
    "bfloat16 weights to train": (setting(model__param_dtype="bfloat16"), "these weights are trained.*lora.rank=16"),
    "fewer positions than tokens": (
        calls("json", "config.json", max_position_embeddings=24),
        r"a prompt of \d+ tokens and rollout.max_tokens = 19 are together more than the model's 24 positions",
    ),
    "prompts too long": (setting(prompt__max_bare_tokens=1), "more than prompt.max_bare_tokens = 1; raise the limit"),
    # --- the workdir ---
    "workdir is a file": (written("run", b"thesis"), "run exists and is not a run's folder|is not a folder"),
    "workdir is another's": (written("run/thesis.txt", b"years"), "exists and is not a run's folder"),
    "another run": (written("run/config.json", b'{"seed": 7}'), "holds a run with another configuration"),
    "broken run": (written("run/config.json", b"{"), "config.json is not valid JSON"),
    "no workdir": (lambda scene: setattr(scene, "workdir", None), "--workdir is missing"),
    "no config": (lambda scene: setattr(scene, "config", None), "--config is missing"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    sizes = ModelConfig(len(tokenizer), width=8, layers=1, query_heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    params = params_lib.init(param_specs(sizes), jax.random.key(0), sharding.make_mesh(fsdp=8))
    path = tmp_path_factory.mktemp("models") / "model"
    hf_save.save(path, params, sizes, tokenizer, (tokenizer.eos_token_id,), "llama")
    return path


def command(scene: Scene, monkeypatch) -> int:
    """The command's exit code, from the point on at which its flags have been read."""

    def run(function, flags_parser):
        function(None)

    def accepted(*_):  # all input has been read
        raise AssertionError("nobody refused")

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["refusals"])
    monkeypatch.setattr(main.command.app, "run", run)
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value=scene.config))
    monkeypatch.setattr(main, "_WORKDIR", SimpleNamespace(value=scene.workdir and str(scene.workdir)))
    monkeypatch.setattr(workdir, "claim", accepted)
    with pytest.raises(SystemExit) as end:
        main.command_line()
    return end.value.code


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_one_message_and_every_file_stays_as_it_was(name, tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 600.0)  # on a slow machine a bar would come before it
    spoil, message = CASES[name]
    scene = Scene(tmp_path, model)
    spoil(scene)
    before = files(tmp_path)
    assert command(scene, monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said
    assert files(tmp_path) == before


def test_there_are_at_least_sixty_and_the_scene_itself_is_good(tmp_path, model, monkeypatch):
    assert len(CASES) >= 60
    with pytest.raises(AssertionError, match="nobody refused"):
        command(Scene(tmp_path, model), monkeypatch)
