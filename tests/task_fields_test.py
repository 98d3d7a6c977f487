"""Every field of a task's section changes what it is to change of the task, and nothing else.

``config_effect_test.py`` says that a field reaches the task's dataclass; here the task is made and asked.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import base
from ctxjax.data.splits import SPLITS
from ctxjax.data.task import GameTask, World
from ctxjax.data.tasks import TASKS
from ctxjax.inputs import base_model

RESPONSES = (r"\boxed{4}", "The answer is 5.", "<answer>B</answer>", "<answer>yes</answer>", "Arr, 4!", "s1 abc")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Rows for all tasks over files."""
    folder = tmp_path_factory.mktemp("files")
    options = {"opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": 1}
    rows = [
        {
            "question": f"{n} + 1?",
            "asked": f"{n} and 1?",
            "answer": f"{n + 1}",
            "right": f"{n + 2}",
            "note": f"n{n % 3}",
            "reference": f"{n + 1}",
            "chat": [{"role": "user", "content": f"chat {n}?"}],
            "told": [{"role": "user", "content": f"{n} + 1? Say {n + 1}."}],
        }
        for n in range(90)
    ]
    labelled = [row | options for row in rows]
    written = {"rows": rows[:60], "more": rows[30:], "medmcqa": labelled[:60], "moremed": labelled[30:]}
    others = [{"question": f"{n}?", "answer": "7", "context": f"Other {n}."} for n in range(8)]
    written |= {"under": others, "pool": [{"context": f"Context {n}.", "check": "quoted"} for n in range(8)]}
    for name, own in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"Context {name}.")
    (folder / "lessons.txt").write_text("- EXPERIENCE ITEM: up=ka;\n")
    texts = [f"{n} you @user ! {'fine day ' * (n % 4)}" for n in range(90)]
    (folder / "offensive").mkdir()
    for split, own in (("train", texts[:60]), ("val", texts[60:75]), ("test", texts[75:])):
        (folder / "offensive" / f"{split}_text.txt").write_text("\n".join(own) + "\n")
        (folder / "offensive" / f"{split}_labels.txt").write_text(
            "\n".join("01"[n % 2] for n in range(len(own))) + "\n"
        )
    cases = "".join(f'{n},"case {n} ? #",{("hateful", "non-hateful")[n % 2]},{n}\n' for n in range(30))
    (folder / "test_suite_cases.csv").write_text("case_id,test_case,label_gold,templ_id\n" + cases)
    comments = "".join(f"comment {n};{n % 2}.0\n" for n in range(30))
    (folder / "Ethos_Dataset_Binary.csv").write_text("comment;isHate\n" + comments)
    return folder


SMALL = {
    **dict.fromkeys(("rules", "policy", "scratch"), {"train_questions": 20, "dev_questions": 8, "test_questions": 9}),
    "tiny_safety": {"vocabulary": 400, "longest": 30, "dev_questions": 0},
    "qa_jsonl": {"dev_questions": 9, "test_questions": 8},
    "hints": {"hint": "note"},
    "text_game": {"size": 3, "pieces": 2, "turns": 5},
}
QUESTIONS = "train dev test"
LIMITS = {
    "train_questions": (11, "train"), "dev_questions": (2, "dev"), "test_questions": (3, "test"),
}  # fmt: skip
# Field -> (another value, the parts that change); two values: of the task that it is compared with, too.
POOL = {"other_contexts_file": ("FILES/pool.jsonl", "others")}
TWO = {"context": "", "context_files": ("FILES/a.txt", "FILES/b.txt")}
CONTEXTS = POOL | {
    "context": ("Think again.", "contexts"),
    "context_file": ({"context": "", "context_file": "FILES/a.txt"}, "contexts"),
    "context_files": (TWO, "contexts"),
    "context_seed": (TWO | {"context_seed": 3}, "contexts", TWO),
}
COLUMN = {"context_column": ({"context": "", "context_column": "note"}, "contexts")}
ROWS = {
    "path": ("FILES/more.jsonl", QUESTIONS), "test_path": ("FILES/more.jsonl", QUESTIONS), "limit": (20, QUESTIONS),
}  # fmt: skip
FORMAT = {"ask_format": (False, QUESTIONS)}
WORLD = {"seed": (5, f"contexts others paraphrase drawn facts {QUESTIONS}")}
FIELDS = {
    "rules": WORLD | {
        "context_index": (3, "contexts paraphrase references"), "train_questions": (11, "train"),
        "dev_questions": (5, "dev"), "test_questions": (4, "test"), "empty_share": (0.5, "drawn facts"),
    },
    "policy": WORLD | {
        "context_index": (3, "contexts paraphrase references"), "train_questions": (11, "train"),
        "dev_questions": (5, "dev"), "test_questions": (4, "test"), "empty_share": (0.5, "drawn facts"),
    },
    "scratch": {
        "seed": (5, f"{WORLD['seed'][1]} references"),  # some question is asked in both worlds
        "context_index": (3, "contexts paraphrase references"), "train_questions": (11, "train"),
        "dev_questions": (5, "dev"), "test_questions": (4, "test"), "empty_share": (0.5, "drawn facts"),
    },
    "qa_jsonl": CONTEXTS | COLUMN | {
        "path": ("FILES/more.jsonl", QUESTIONS), "question": ("asked", QUESTIONS), "reference": ("right", "references"),
        "grading": ("exact", "grades"), "limit": (20, QUESTIONS), "dev_questions": (5, QUESTIONS),
        "test_questions": (4, "train test"), "other_rows": ("FILES/under.jsonl", "others"),
        "messages": ("chat", QUESTIONS),
        "context_template": ({"context": "", "context_template": "Notes: {note}"}, "contexts"),
        "teacher_messages": ({"context": "", "teacher_messages": "told"}, "contexts"),
    },
    "self_study": CONTEXTS | LIMITS | {
        "path": ("FILES/more.jsonl", QUESTIONS), "check": ("starts_with Arr", "grades"),
    },
    "medical": CONTEXTS | COLUMN | LIMITS | FORMAT | {
        "path": ("FILES/moremed.jsonl", QUESTIONS), "test_path": ("FILES/moremed.jsonl", QUESTIONS),
        "limit": (20, QUESTIONS), "first_label": (1, "references"),
    },
    "math": CONTEXTS | COLUMN | LIMITS | FORMAT | ROWS,
    "hints": POOL | LIMITS | {field: (value, f"contexts {parts}") for field, (value, parts) in ROWS.items()} | {
        "question": ("asked", f"contexts {QUESTIONS}"), "reference": ("right", "references"),
        "hint": ("answer", "contexts"), "template": ("Hint: {hint}", "contexts"), "grading": ("exact", "grades"),
    },
    "safety": CONTEXTS | LIMITS | FORMAT | {"sets": (("ethos",), QUESTIONS)},
    "text_game": CONTEXTS | {
        "game": ("grid_walk", QUESTIONS), "size": ({"size": 4, "turns": 7}, QUESTIONS, {"turns": 7}),
        "pieces": (1, f"contexts {QUESTIONS}"), "turns": (4, "turns"), "seed": (5, QUESTIONS),
        "train_questions": (4, "train"), "dev_questions": (2, "dev"), "test_questions": (3, "test"),
    },
    "style": POOL | LIMITS | {"demand": ("french", "contexts paraphrase grades")},
    "handbook": LIMITS | {
        "seed": (5, f"contexts others paraphrase unrelated {QUESTIONS}"),
        "subject": ("company", f"contexts others paraphrase unrelated {QUESTIONS}"),
        "style": ("table", "contexts paraphrase unrelated"),
        "tokens": (600, "contexts others paraphrase unrelated"),
    },
    "tiny_safety": LIMITS | {
        "seed": (5, "others drawn facts"), "vocabulary": (450, "vocabulary facts"),
        "longest": (12, f"drawn facts {QUESTIONS}"), "train_questions": (11, "train drawn facts"),
    },
    "tiny_grid": LIMITS | WORLD | {
        "context_index": (3, f"contexts paraphrase {QUESTIONS}"),
        "size": (4, f"vocabulary contexts drawn facts {QUESTIONS}"), "holes": (1, f"contexts drawn facts {QUESTIONS}"),
        "turns": (3, "turns drawn facts"), "empty_share": (0.5, "drawn facts"),
        "context_file": ("FILES/lessons.txt", "contexts paraphrase"),
    },
}  # fmt: skip
# ``records`` is a section of its own (records_test.py), ``required`` no field of a configuration; folders of published
# files are read by name. What the writer of questions is given names their file (self_study_test.py); ``prompt`` is a
# section of its own, too.
OTHERS = {name: {"records", "required"} for name in TASKS}
OTHERS |= {"safety": {"records", "required", "path", "context_column"}, "tiny_safety": {"records", "path"}}
WRITER = {
    "writer", "questions", "follow_up_share", "unrelated_share", "temperature", "longest_question", "longest_reference",
    "seed", "cache",
}  # fmt: skip
OTHERS["text_game"] = {"records", "required", "context_column"}
OTHERS["self_study"] = {"records", "required", "prompt", "context_column"} | WRITER


def make_config(name: str, files: Path, changes: dict):
    config = base.get_config()
    config.task, config.model.path, section = name, "a/model", config[name]
    path = {"medical": "medmcqa.jsonl", "safety": "", "tiny_safety": ""}.get(name, "rows.jsonl")
    given = {"path": str(files / path), "context": "Think."} | SMALL.get(name, {}) | changes
    for field, value in given.items():
        if field in section:
            section[field] = in_folder(files, value)
    return config_lib.experiment(config, 1)


def make(name: str, files: Path, changes: dict):
    return TASKS[name][1](make_config(name, files, changes).task_config)


def in_folder(files: Path, value):
    """A value in which FILES stands for the folder of the rows."""
    if isinstance(value, tuple):
        return tuple(in_folder(files, one) for one in value)
    return value.replace("FILES", str(files)) if isinstance(value, str) else value


def describe(task) -> dict:
    """What a task makes, by part."""
    rows = {split: task.rows(split) for split in SPLITS}
    every = [row for own in rows.values() for row in own]
    found = {split: [row.question for row in own] for split, own in rows.items()}
    found |= {
        "contexts": [row.context for row in every[:9]],
        "references": {row.question: row.reference for row in every},
    }
    found["others"] = {split: task.other_contexts(split) for split in SPLITS}
    found["paraphrase"] = task.paraphrase(every[0], np.random.default_rng(0))
    found["unrelated"], found["turns"] = task.unrelated(), getattr(task, "max_turns", 1)
    if not isinstance(task, GameTask):
        found["grades"] = [task.grade(response, "4").correct for response in RESPONSES]
    if isinstance(task, World):
        drawn = [task.pretraining_row(np.random.default_rng(number)) for number in range(60)]
        found |= {"facts": task.pretraining_facts(), "drawn": drawn, "vocabulary": len(task.tokenizer())}
    return found


def find_differences(before: dict, after: dict) -> set[str]:
    """The parts that differ; of the references, those of the questions that both tasks ask."""
    asked = before["references"].keys() & after["references"].keys()
    parts = {part for part in before.keys() - {"references"} if before[part] != after[part]}
    differ = any(before["references"][question] != after["references"][question] for question in asked)
    return parts | ({"references"} if differ else set())


@pytest.mark.parametrize("name", TASKS)
def test_a_field_changes_its_own_parts_of_the_task(name, files):
    plain = describe(make(name, files, {}))
    found, expected = {}, {}
    for field, (value, parts, *compared) in FIELDS[name].items():
        before = describe(make(name, files, compared[0])) if compared else plain
        after = describe(make(name, files, value if isinstance(value, dict) else {field: value}))
        found[field], expected[field] = find_differences(before, after), set(parts.split())
        split = field.removesuffix("_questions")
        assert split not in SPLITS or len(after[split]) == value < len(before[split]), field
    assert found == expected
    declared = {field.name for field in dataclasses.fields(TASKS[name][0])}
    assert declared - FIELDS[name].keys() <= OTHERS[name]


def test_a_base_has_a_folder_for_all_that_determines_it(files):
    def find(name: str, changes: dict, **base_changes) -> Path:
        experiment = make_config(name, files, changes)
        config = dataclasses.replace(experiment.base, **base_changes)
        return base_model.find_base_folder(config, name, TASKS[name][1](experiment.task_config))

    first = find("rules", {})
    settings = dataclasses.asdict(make_config("rules", files, {}).base)
    assert find("rules", {}, cache="/elsewhere") == Path("/elsewhere") / first.name
    others = {field: 2 * value + 1 for field, value in settings.items() if field not in ("cache", "family")}
    others["family"] = "qwen3"
    changed = {field: find("rules", {}, **{field: value}) for field, value in others.items()}
    assert len({first, *changed.values()}) == len(settings)
    for name in ("rules", "policy", "scratch", "tiny_grid", "tiny_safety"):
        own = find(name, {})
        for field, (value, parts, *_) in FIELDS[name].items():
            assert (find(name, {field: value}) != own) == ("facts" in parts), (name, field)
