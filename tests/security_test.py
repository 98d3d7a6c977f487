"""Nothing that is read is run, nothing that is shown is run, secrets are not written down, and paths stay inside."""

import ast
import functools
from html.parser import HTMLParser
import json
from pathlib import Path

from hypothesis import given, settings, strategies as st
import jinja2
import pytest

from ctxjax.configs import tiny
from ctxjax.data import prompts
from ctxjax.data.task import Row
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.host import redact, workdir as workdir_lib
from ctxjax.inputs import model_folder as folder_lib
from ctxjax.report import page, run_files

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("ctxjax", "configs", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
ATTRIBUTES = {
    "system",
    "popen",
    "mktemp",
    "literal_eval",
    "loads_pickle",
    "from_pickle",
    "read_pickle",
    "trust_remote_code",
}


def offences(tree: ast.AST) -> list[str]:
    """What a source does that runs what it reads: by line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in MODULES:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            name = name or (ast.unparse(node.func) if isinstance(node.func, ast.Attribute) else "")
            if name in BUILTINS or name.split(".")[-1] in ATTRIBUTES or name in ("torch.load", "np.load", "numpy.load"):
                found.append(name)
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not is_false:
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert not offences(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(x)", "eval(x)", "np.load(x)", "f(trust_remote_code=True)",
     "run(x, shell=True)", "import yaml", "os.system(x)", "np.load(x, allow_pickle=y)"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source):
    assert offences(ast.parse(source))


def test_code_beside_a_tokenizer_is_not_run(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(fields))
    try:
        folder_lib.load_tokenizer(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
     "{% include '/etc/passwd' %}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"],
)  # fmt: skip
def test_a_chat_template_is_kept_in_its_sandbox(template, tokenizer):
    evil = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    evil.chat_template = template
    try:
        text = prompts.render(evil, Row("1", "#1:abc", None, "s1 bcd"), prompts.PromptConfig())
    except (ValueError, TypeError, jinja2.TemplateError):
        return
    assert "class" not in text and "root" not in text


# --- What is shown ---


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, sorted(name for name, _ in attrs)))


def page_with(text: str) -> Tags:
    """The report of a run in which a model's answers, the question and the context are this text."""
    items = [
        {"id": "1", "view": view, "question": text, "context": text, "reference": text, "text": text, "parsed": text,
         "correct": False, "length": 3, "truncated": False} for view in ("bare", "context")
    ]  # fmt: skip
    return Tags(page.render(run_files.RunFiles({"opcd": {"acc_x": 0.5}}, {}, {"opcd": []}, {"opcd": items}), "run"))


MARKUP = st.lists(
    st.sampled_from(["<script>", "</script>", "<img src=x onerror=a>", "<!--", "-->", "<", ">", "&", "&lt;", "'", '"',
                     "</td>", "<a href='javascript:b'>", "{{ 7*7 }}", "{% raw %}", "$x$", "\x00", "a", " "]),
    min_size=1,
    max_size=30,
)  # fmt: skip


@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(st.one_of(MARKUP.map("".join), st.text(min_size=1, max_size=20)))
def test_what_a_model_says_adds_no_markup_to_the_report(text):
    assert page_with(f"x{text}x").tags == plain().tags


@functools.cache
def plain() -> Tags:
    return page_with("xx")


# --- Secrets ---

SECRETS = {
    "https://me:pa55word@host/x": "https://[hidden]@host/x",
    "s3://AKIA:key@bucket": "s3://[hidden]@bucket",
    "--config.model.path=hf_abcdefghijklmnopqrstuv": "--config.model.path=[hidden]",
    "https://host/x?token=abc&y=1": "https://host/x?[hidden]&y=1",
    "org/name@main": "org/name@main",
    "me@host.org wrote": "me@host.org wrote",
    "/data/hf_models/x": "/data/hf_models/x",
}


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text):
    assert redact.hide_secrets(text) == SECRETS[text]
    assert redact.hide_secrets({"a": [text, 3, None], "b": (text,)}) == {
        "a": [SECRETS[text], 3, None],
        "b": (SECRETS[text],),
    }


def test_secrets_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-indeed")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "configs/tiny")
    assert redact.hide_secrets("a very-secret-indeed b configs/tiny") == "a [hidden] b configs/tiny"


def test_no_secret_gets_into_a_runs_facts(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", "--config.model.path=https://me:pa55word@host/x"])
    monkeypatch.setenv("HF_TOKEN", "very-secret-indeed")
    config = tiny.get_config()
    config.model.path, config.qa_jsonl.path = "https://me:pa55word@host/x", "/data/very-secret-indeed.jsonl"
    written = json.dumps(workdir_lib.collect_facts(config))
    assert "pa55word" not in written and "very-secret" not in written and "[hidden]@host/x" in written


# --- Paths ---


@pytest.mark.parametrize("name", ["../other", "a/b", "..", "/etc"])
def test_a_report_reads_no_folder_outside_of_its_run(name, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({name: {"acc_x": 1.0}}))
    with pytest.raises(ValueError, match="results.json: .* is no name of an arm"):
        run_files.read_run(tmp_path)
