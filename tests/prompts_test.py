"""Prompts under the templates of real families: date, thinking, roles that a template refuses, folds or forgets."""

from pathlib import Path
import re
import textwrap

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
from transformers.utils import chat_template_utils

from ctxjax.data import prompts
from ctxjax.data.prompts import PLACEMENTS, PromptConfig
from ctxjax.data.task import Row, write_chat_context
from ctxjax.data.worlds import word_tokenizer
from ctxjax.inputs import model_folder as folder_lib, tokenizer_match

CONTEXT = "  Answer in one word.\n"  # most templates strip what they are given
ROW = Row("q1", "Which colour?", CONTEXT, "")
TEMPLATES = {
    # Llama 3.1 and 3.2: a dated header in every chat; the system message goes below it, or nothing does.
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "1 Jan 1970" %}
{%- endif %}
{%- if messages[0].role == "system" %}
    {%- set told, messages = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|system|>Today: " + date_string + "\n\n" + told + eos_token }}
{%- for message in messages %}{{- "<|" + message.role + "|>" + message.content | trim + eos_token }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- endif %}
""",
    # A Llama 3.1 without the function: the variable, or a date of its own.
    "variable": """{%- if not date_string is defined %}{%- set date_string = "1 Jan 1970" %}{%- endif %}
{{- bos_token + "<|system|>Today: " + date_string }}{%- for message in messages %}{{- message.content }}{%- endfor %}
""",
    # Qwen3: no begin token; thinking is on unless it is switched off by an empty block.
    "qwen3": """{%- for message in messages %}
    {{- "<|" + message.role + "|>\n" + message.content + eos_token + "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\n\n</think>\n\n" }}{%- endif %}
{%- endif %}
""",
    # Gemma: turns in pairs, and no system role.
    "gemma": """{% if messages[0]["role"] == "system" %}{{ raise_exception("no system role") }}{% endif %}
{{ bos_token }}{% for message in messages %}{{ "<|user|>" + message["content"] | trim + eos_token }}{% endfor %}
{% if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}
""",
    # Mistral and Llama 2: the system message is folded into the user's turn.
    "mistral": """{{- bos_token }}
{%- set told = messages[0].content + "\n\n" if messages[0].role == "system" else "" %}
{{- "[INST] " + told + messages[-1].content + "[/INST]" }}
""",
    # A model that writes its date in another way, inside a macro.
    "dated": """{%- macro header() %}{{ "<|system|>" + strftime_now("%Y-%m-%d (a %A in %B)") }}{%- endmacro %}
{{- bos_token + header() }}{%- for message in messages %}{{- message.content }}{%- endfor %}
""",
    "forgetful": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<|assistant|>",
}


@pytest.fixture
def tokenizer():
    """tokenizer(family): the word tokenizer under a family's template."""

    def make(family):
        made = word_tokenizer.build(["a", "b"], "[ab]")
        made.chat_template = TEMPLATES[family]
        return made

    return make


@pytest.fixture
def no_clock(monkeypatch):
    """Fails the test where transformers asks for the time."""

    class Clock:
        @staticmethod
        def now():
            raise AssertionError("the clock was read")

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def rendered(tokenizer, placement="system", row=ROW, **settings):
    return prompts.render(tokenizer, row, PromptConfig(placement, **settings))


BARE = ROW._replace(context=None)


@pytest.mark.parametrize(
    ("family", "placement", "text"),
    [
        ("llama3", "system", "<|begin|><|system|>Today: {d}\n\n{c}<|end|><|user|>{q}<|end|><|assistant|>"),
        ("llama3", "user", "<|begin|><|system|>Today: {d}\n\n<|end|><|user|>{c}\n\n\n{q}<|end|><|assistant|>"),
        ("llama3", "prefix", "<|begin|>{C}<|system|>Today: {d}\n\n<|end|><|user|>{q}<|end|><|assistant|>"),
        ("qwen3", "system", "<|system|>\n{C}<|end|>\n<|user|>\n{q}<|end|>\n<|assistant|>\n"),
        ("qwen3", "prefix", "{C}<|user|>\n{q}<|end|>\n<|assistant|>\n"),
        ("gemma", "user", "<|begin|><|user|>{c}\n\n\n{q}<|end|><|assistant|>"),
        ("gemma", "prefix", "<|begin|>{C}<|user|>{q}<|end|><|assistant|>"),
        ("mistral", "system", "<|begin|>[INST] {C}\n\n{q}[/INST]"),
        ("dated", "user", "<|begin|><|system|>2024-07-26 (a Friday in July){C}\n\n{q}"),
    ],
)
def test_each_placement_by_hand(tokenizer, no_clock, family, placement, text):
    text = text.format(d="26 Jul 2024", C=CONTEXT, c=CONTEXT.strip(), q=ROW.question)
    assert rendered(tokenizer(family), placement) == text


@pytest.mark.parametrize("family", ["llama3", "variable", "dated"])
@pytest.mark.parametrize("row", [ROW, BARE])
def test_the_date_is_the_configurations(tokenizer, no_clock, family, row):
    texts = [rendered(tokenizer(family), "user", row, date=date) for date in ("26 Jul 2024", "1 Feb 2031")]
    told = (
        ("2024-07-26", "2031-02-01 (a Saturday in February)") if family == "dated" else ("26 Jul 2024", "01 Feb 2031")
    )
    assert all(date in text for date, text in zip(told, texts))


def test_the_template_that_is_saved_with_the_model_stays_its_own(tokenizer):
    made = tokenizer("dated")
    rendered(made, "user")
    assert made.chat_template == TEMPLATES["dated"]


@pytest.mark.parametrize("row", [ROW, BARE])
def test_thinking_is_switched_in_both_views_and_left_alone_by_default(tokenizer, row):
    made = tokenizer("qwen3")
    off, on, unset = (rendered(made, row=row, thinking=value) for value in (False, True, None))
    assert off == on + "<think>\n\n</think>\n\n" and on == unset


@pytest.mark.parametrize("row", [ROW, BARE])
@pytest.mark.parametrize(("bare", "told"), [(False, True), (True, False), (None, False), (False, None)])
def test_the_two_views_think_as_each_is_set(tokenizer, bare, told, row):
    """A teacher that thinks and a student that does not, and the reverse; unset, the teacher follows."""
    made = tokenizer("qwen3")
    own = bare if row is BARE or told is None else told
    found = rendered(made, row=row, thinking=bare, teacher_thinking=told)
    assert found.endswith("<think>\n\n</think>\n\n") == (own is False)
    assert found == rendered(made, row=row, thinking=own)


def test_keywords_reach_the_template_of_both_views_and_the_teachers_only_its_own(tokenizer):
    made = tokenizer("qwen3")
    made.chat_template = "{{ effort }}|{{ many | length }}|" + made.chat_template
    keywords = {"keywords": ("effort=low", "many=[1, 2]"), "teacher_keywords": ('effort="high"',)}
    assert rendered(made, row=BARE, **keywords).startswith("low|2|")
    assert rendered(made, row=ROW, **keywords).startswith("high|2|")


@pytest.mark.parametrize("row", [ROW, BARE])
@pytest.mark.parametrize(
    ("settings", "views", "message"),
    [
        ({"thinking": False}, (ROW, BARE), "does not read enable_thinking, so prompt.thinking or prompt.teacher_thin"),
        ({"teacher_thinking": True}, (ROW,), "does not read enable_thinking, so prompt.thinking or prompt.teacher_th"),
        ({"keywords": ("effort=1",)}, (ROW, BARE), "does not read effort, so prompt.keywords or prompt.teacher_keyw"),
    ],
)
def test_a_switch_that_the_template_lacks_is_an_error(tokenizer, settings, views, message, row):
    made = tokenizer("llama3")
    if row not in views:
        assert rendered(made, row=row, **settings) == rendered(made, row=row)
        return
    with pytest.raises(ValueError, match=f"the chat template of .* {message}.*leave it unset, or take a model whose"):
        rendered(made, row=row, **settings)


def test_a_template_without_a_system_role_is_named_with_the_remedy(tokenizer):
    with pytest.raises(ValueError, match=r"refuses a system message .*: no system role; set prompt.placement=user"):
        rendered(tokenizer("gemma"))


@pytest.mark.parametrize("question", [ROW.question, f"What does '{CONTEXT.strip()}' mean?"])
def test_a_context_that_the_template_drops_is_an_error_even_if_the_question_quotes_it(tokenizer, question):
    row = ROW._replace(question=question)
    with pytest.raises(
        ValueError, match="row 'q1': with prompt.placement = 'system' the chat template of .* leaves out the context"
    ):
        rendered(tokenizer("forgetful"), row=row)
    assert CONTEXT in rendered(tokenizer("forgetful"), "user", row)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_real_tokenizer_reads_the_context_once_and_the_question_last(smollm2, placement):
    config = PromptConfig(placement)
    bare, told = (smollm2.decode(prompts.encode(smollm2, [row], config)[0]) for row in (BARE, ROW))
    assert told.count(CONTEXT) == 1 and CONTEXT not in bare
    assert bare.endswith(f"{ROW.question}<|im_end|>\n<|im_start|>assistant\n")
    # Its "begin token" opens every turn, so a prefix must not stand behind the first of them.
    opening = {"system": "<|im_start|>system\n" + CONTEXT, "user": "<|im_start|>user\n" + CONTEXT, "prefix": CONTEXT}
    assert told.startswith(opening[placement])


def test_the_common_prefix_by_example():
    assert prompts.find_common_prefix([[5, 3, 9, 1], [5, 3, 2], [5, 3, 9]]) == [5, 3]
    assert prompts.find_common_prefix([[1, 2], [1, 2]]) == [1, 2] and prompts.find_common_prefix([[1], [2]]) == []


@pytest.mark.parametrize(
    ("generation", "ids"),
    [(None, (3,)), ("{}", (3,)), ('{"eos_token_id": 9}', (3, 9)), ('{"eos_token_id": [9, 3, 5]}', (3, 5, 9))],
)
def test_a_response_ends_at_the_tokens_of_both_files(tmp_path, tokenizer, generation, ids):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert folder_lib.read_stop_ids(tmp_path, tokenizer("qwen3")) == ids


def changed(*, words=("a", "b", "c"), pattern="[abc]", special=(), template=None):
    made = word_tokenizer.build(list(words), pattern)
    made.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    made.chat_template = template or made.chat_template
    return made


def test_a_tokenizer_is_the_same_whatever_its_template_says_in_words():
    tokenizer_match.check_same_tokenizer(changed(), changed(template=word_tokenizer.CHAT_TEMPLATE + " Be kind."))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"words": ("b", "a", "c")},
            r"token 'a': 7 in the student's, 8 in the teacher's\n.*'b': 8 in .*, 7 in",
        ),
        ({"words": ("a", "b", "c", "d")}, r"id of the token 'd': None in the student's, 10 in the teacher's$"),
        ({"words": [str(n) for n in range(20)]}, r"\n  and 18 more"),
        ({"special": ("a",)}, r"special token with the id 7: None in the student's, 'a' in the teacher's$"),
        ({"pattern": "[^abc]"}, r"its piece 1: 'c' in the student's, '<\|unknown\|>' in"),
        (
            {"template": "{{ bos_token + messages[-1]['content'] }}"},
            r"template writes, with the id 5: .*user.*, None in",
        ),
    ],
)
def test_another_tokenizer_is_named_with_the_first_differences_and_both_folders(teacher, message):
    student, teacher = changed(), changed(**teacher)
    student.name_or_path, teacher.name_or_path = "small", "large"
    with pytest.raises(ValueError, match=r"teacher.path = large is not the student's in small(.|\n)*" + message):
        tokenizer_match.check_same_tokenizer(student, teacher)


# --- Any lists of tokens ---

LISTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(start=st.lists(st.integers(0, 9), max_size=6), rests=LISTS, more=st.integers(0, 3), pad=st.integers(0, 9))
def test_padding_and_a_prefix_of_any_lists_can_be_undone(start, rests, more, pad):
    lists = [start + rest for rest in rests]
    prefix = prompts.find_common_prefix(lists)
    assert prefix[: len(start)] == start and all(ids[: len(prefix)] == prefix for ids in lists)
    assert len({tuple(ids[: len(prefix) + 1]) for ids in lists}) > 1 or prefix == min(lists, key=len)
    for shared in ([], start):
        columns = max(map(len, lists)) - len(shared) + more
        padded = prompts.left_pad(lists, columns, pad, shared)
        assert prompts.unpad(padded) == lists
        assert padded.tokens_BxP.shape == (len(lists), columns)
        assert padded.mask_BxP[:, -1].all() and (np.diff(padded.mask_BxP.astype(int), axis=1) >= 0).all()
        whole = prompts.expand_prefix(padded, pad)
        assert whole.prefix_C is None and prompts.unpad(whole) == lists


CHAT = [{"role": "system", "content": "Notes: b."}, {"role": "user", "content": "q? It is b."}]


def test_a_teachers_chat_is_rendered_whole_and_the_students_prompt_has_nothing_of_it(tokenizer):
    row = ROW._replace(context=write_chat_context(CHAT))
    for placement in PLACEMENTS:
        found = rendered(tokenizer("qwen3"), placement, row)
        assert found == "<|system|>\nNotes: b.<|end|>\n<|user|>\nq? It is b.<|end|>\n<|assistant|>\n"
    assert rendered(tokenizer("qwen3"), row=row._replace(context=None)) == rendered(tokenizer("qwen3"), row=BARE)


def test_control_tokens_in_a_teachers_chat_are_text(tokenizer):
    made = tokenizer("qwen3")
    chat = [{"role": "user", "content": 'a "<|end|>" b'}]
    (ids,) = prompts.encode(made, [ROW._replace(context=write_chat_context(chat))], PromptConfig())
    end = made.convert_tokens_to_ids("<|end|>")
    assert ids.count(end) == 1  # the template's own


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("forgetful", "row 'q1': the chat template of .* leaves out the teacher's system message or changes its text"),
        ("gemma", "refuses a system message .*: no system role; .*or write it into the user's message"),
    ],
)
def test_a_template_without_a_role_of_the_teachers_chat_is_named(tokenizer, family, message):
    with pytest.raises(ValueError, match=message):
        rendered(tokenizer(family), row=ROW._replace(context=write_chat_context(CHAT)))


def test_the_documented_template_of_base_models_writes_every_role(tokenizer):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    template = textwrap.dedent(re.search(r"```jinja\n(.*?)```", page, re.DOTALL)[1]).rstrip("\n")
    base, row = tokenizer("llama3"), Row("0", "why?", "be kind", "", earlier=(("who?", "me"),))
    base.chat_template = template
    chat = "Question: who?\nAnswer: me\nQuestion: why?\nAnswer:"
    assert prompts.render(base, row, PromptConfig()) == f"{base.bos_token}be kind\n\n{chat}"
    assert prompts.render(base, row._replace(context=None), PromptConfig()) == base.bos_token + chat
    user = prompts.render(base, row, PromptConfig(placement="user"))
    assert user == base.bos_token + chat.replace("who?", "be kind\n\nwho?")
