"""Every figure, cell and curve of the page holds the numbers of its own arm and view: all of them differ, and they are
read back from the page's text and from the drawn lines."""

import html
import json
import re

from matplotlib.colors import to_hex
import pytest

from ctxjax.configs import base
from ctxjax.report import plots, write_report
from ctxjax.report.model_card import model_card

ARMS = ("opcd", "opcd_anchored")
MODELS = ("base", *ARMS)
COSINES = ("cosine_by_layer", "cosine_centred_by_layer", "cosine_control_by_layer", "cosine_p5_by_layer")
# Numbers of the two tables by header: (key, format); two keys share a column as "without / with".
SHARES = {
    "Acc_x %": "acc_x", "Acc_xc %": "acc_xc", "Harm %": "harm", "Benefit %": "benefit", "BothCorrect %": "both_correct",
    "empty context %": "acc_empty", "obedience %": "obedience", "paraphrased context %": "acc_paraphrase",
    "default answers %": "acc_default", "harm floor %": "harm_floor",
}  # fmt: skip
SIGNED = {"Gap pp": "gap", "dLen %": "dlen", "excess harm pp": "excess_harm"}
PAIRS = {
    "lenient x / xc %": ("acc_x_lenient", "acc_xc_lenient", 100), "length x / xc": ("length_x", "length_xc", 1),
    "truncated x / xc %": ("truncated_x", "truncated_xc", 100), "readable x / xc %": ("parse_x", "parse_xc", 100),
}  # fmt: skip


def numbers_of(model: str) -> dict:
    """Metrics of which no two are equal, in one model or in two."""
    start = 0.011 + 0.0037 * MODELS.index(model)
    keys = [*SHARES.values(), *SIGNED.values(), *(key for keys in PAIRS.values() for key in keys[:2])]
    found = {key: start + 0.043 * place for place, key in enumerate(keys)}
    found |= {f"{key}_ci": [found[key] - 0.0101, found[key] + 0.0202] for key in SHARES.values()}
    found |= {"length_x": 5.3 + 10 * start, "length_xc": 8.4 + 10 * start, "n": 400}
    found |= {"mcnemar_p": 0.2 + start, "regime": f"{model} regime", "distill": 1.5 + start, "view_kl": 0.7 + start}
    found |= {key: [1.0, 0.9 - start - 0.07 * place, 0.8 - start - 0.05 * place] for place, key in enumerate(COSINES)}
    found["view_kl_by_position"] = [0.4 + start, 0.2 + 2 * start, 0.1 + start]
    count = 10 * MODELS.index(model)
    found["flips"] = {"right_right": 150 + count, "right_wrong": 41, "wrong_right": 73, "wrong_wrong": 136 - count}
    found["obedience_by_context"] = {"Speak French.": [0.25 + start, 12], "Shout.": [0.55 + start, 9]}
    if model in ARMS:
        found["step"] = 30
    if model == ARMS[1]:
        found["harm_minus_opcd"] = [-0.123, -0.234, 0.345]
        found["selected"] = {key: value / 2 for key, value in found.items() if isinstance(value, float)} | {"step": 20}
    return found


RESULTS = {model: numbers_of(model) for model in MODELS}


def metric_rows(arm: str) -> list[dict]:
    """Dev rows of steps 0 to 30 and losses of steps 1 to 30, other ones in each arm."""
    more = 0.05 * MODELS.index(arm)
    names = ("acc_x", "acc_xc", "obedience")
    rows = [
        {"step": step} | {f"dev/{name}": 0.1 + more + step / 100 + 0.2 * place for place, name in enumerate(names)}
        for step in (0, 10, 20, 30)
    ]
    losses = ("loss", "distill", "anchor", "retain")
    return rows + [
        {"step": step} | {name: 3.0 + more - 0.3 * place - step / 50 for place, name in enumerate(losses)}
        for step in range(1, 31)
    ]


def item_rows(model: str) -> list[dict]:
    views = {"bare": 4, "context": 9, "empty": 30}
    return [
        {
            "id": f"q{number}", "view": view, "sample": 0, "question": f"question {number}", "context": "the context",
            "reference": "yes", "text": f"{model} {view} {number}", "correct": (number + MODELS.index(model)) % 2 == 0,
            "parsed": None, "length": length + number + MODELS.index(model), "truncated": view == "context",
        }
        for number in range(4)
        for view, length in views.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(text of the page, the axes of its figures by their label)."""
    workdir, drawn = tmp_path_factory.mktemp("report"), {}
    (workdir / "results.json").write_text(json.dumps(RESULTS))
    for model in MODELS:
        (workdir / model).mkdir()
        for name, rows in (("items", item_rows(model)), ("metrics", metric_rows(model) if model in ARMS else [])):
            (workdir / model / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def keep(figure, label):
        drawn[label] = figure.axes[0]
        return f"<svg>{html.escape(label)}</svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_svg", keep)
        text = write_report(workdir).read_text(encoding="utf-8")
    return text, drawn


def cells(text: str) -> list[str]:
    """The cells of a row of a table, an interval after its value."""
    found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text, flags=re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", " ", cell)).replace("−", "-").strip() for cell in found]


def table(text: str, mark: str) -> tuple[list[str], dict[str, list[str]]]:
    """(headers, rows by their first cell) of the table whose header has ``mark``."""
    found = next(part for part in re.findall(r"<table.*?</table>", text, flags=re.DOTALL) if mark in part)
    head, *rows = (cells(row) for row in re.findall(r"<tr.*?</tr>", found, flags=re.DOTALL))
    return head, {row[0]: row for row in rows}


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of the lines by colour."""
    return {to_hex(line.get_color()): [*zip(*line.get_data())] for line in axes.lines}


def colour(name: str) -> str:
    return to_hex(plots.STYLES[name][0])


def points(rows: list[dict], key: str, scale: float) -> list:
    return [pytest.approx((row["step"], scale * row[key])) for row in rows if key in row]


def expected_cell(header: str, numbers: dict) -> str | None:
    """The text of a cell of either table."""
    if header in SHARES:
        low, high = (f"{100 * end:.1f}" for end in numbers.get(f"{SHARES[header]}_ci", (0, 0)))
        value = f"{100 * numbers[SHARES[header]]:.1f}"
        return f"{value} [{low}, {high}]" if f"{SHARES[header]}_ci" in numbers else value
    if header in SIGNED:
        return f"{100 * numbers[SIGNED[header]]:+.1f}"
    if header in PAIRS:
        x, xc, scale = PAIRS[header]
        return f"{scale * numbers[x]:.1f} / {scale * numbers[xc]:.1f}"
    others = {
        "view KL": lambda: f"{numbers['view_kl']:.3f}", "distill": lambda: f"{numbers['distill']:.3f}",
        "cosine": lambda: f"{sum(numbers['cosine_by_layer'][1:]) / 2:.3f}", "regime": lambda: numbers["regime"],
        "McNemar p, x against xc": lambda: f"{numbers['mcnemar_p']:.4f}", "step": lambda: str(numbers["step"]),
        "harm minus opcd pp": lambda: "-12.3 [-23.4, +34.5]",
    }  # fmt: skip
    return others[header]()


def test_every_cell_of_the_tables_is_the_number_of_its_model_and_column(page):
    seen = 0
    for mark in ("Acc_x %", "lenient x / xc %"):
        headers, rows = table(page[0], f"<th>{mark}</th>")
        assert mark in headers
        models = dict(RESULTS)
        if mark == "Acc_x %":
            models["opcd_anchored, step 20, best on dev"] = RESULTS["opcd_anchored"]["selected"]
            target = rows.pop("base with context = teacher")
            expected = expected_cell("Acc_xc %", RESULTS["base"])
            assert target[1:] == [expected, expected, *["–"] * (len(headers) - 3)]
        assert rows.keys() == models.keys()
        for model, numbers in models.items():
            for header, cell in zip(headers[1:], rows[model][1:], strict=True):
                absent = header == "cosine" and "cosine_by_layer" not in numbers
                absent |= header == "harm minus opcd pp" and model != "opcd_anchored"
                absent |= header == "step" and model == "base"
                assert cell == ("–" if absent else expected_cell(header, numbers)), (model, header)
                seen += not absent
    assert seen > 60


def test_the_console_and_the_model_card_print_the_same_cells(page, tmp_path):
    """The card has the base and its own arm, and says that it is of another step."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    config = {"loss": loss, "arms": {"opcd_anchored": {"beta": 0.5}}}
    card = model_card(tmp_path, "opcd_anchored", 20, "/models/base", config, False, "float32")
    assert "# base, opcd_anchored, step 20" in card and "(jsd) + 0.5 L_anchor + 0 L_retain" in card
    assert "**The row of opcd_anchored is of step 30, not of the exported step 20.**" in card
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:2] == "| "]
    header, _, *rows = rows
    rows = {row[0]: row for row in rows}
    assert list(rows) == [
        "base", "base with context = teacher", "opcd_anchored", "opcd_anchored, step 20, best on dev"
    ]  # fmt: skip
    for model in ("base", "opcd_anchored"):
        for name, cell in zip(header[1:], rows[model][1:], strict=True):
            expected = expected_cell(name.removesuffix(" [95 % CI]"), RESULTS[model])
            assert cell == (expected if name.startswith("Harm") else expected.split(" [")[0]), (model, name)


def test_the_model_card_of_another_teacher_has_its_accuracy(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"teacher": RESULTS["base"] | {"acc_xc": 0.4321}}))
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    for section in ({"teacher": {"path": "org/larger"}}, {"teacher_base": {"steps": 9}}):
        config = {"loss": loss, "arms": {"opcd_anchored": {"beta": 0.5}}} | section
        card = model_card(tmp_path, "opcd_anchored", 30, "/models/base", config, False, "float32")
        (line,) = [line for line in card.splitlines() if line.startswith("| teacher with context")]
        assert "43.2" in line and "it is to answer as its teacher answers with it" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "by on-policy context distillation (ctxjax)"),
        ({"on_policy_fraction": 0.0}, "by off-policy context distillation, on its teacher's responses (ctxjax)"),
        ({"off_policy_steps": 20}, "by off-policy context distillation, on its teacher's responses (ctxjax)"),
        ({"off_policy_steps": 19}, "by context distillation, on its own responses and its teacher's (ctxjax)"),
        ({"on_policy_fraction": 0.5}, "by context distillation, on its own responses and its teacher's (ctxjax)"),
    ],
)
def test_the_model_card_says_whose_responses_the_arm_learned_from(changes, words, tmp_path):
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    config = {"loss": loss, "arms": {"arm": changes}}
    assert words in model_card(tmp_path, "arm", 20, "org/name", config, False, "float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "L_distill (jsd) "),
        ({"off_policy_steps": 19}, "L_distill (jsd; on the teacher's responses forward_kl) "),
        ({"off_policy_steps": 20}, "L_distill (forward_kl) "),
        ({"on_policy_fraction": 0.0}, "L_distill (jsd) "),
    ],
)
def test_the_model_card_names_both_divergences_of_an_arm_that_began_on_its_teachers_responses(changes, words, tmp_path):
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    config = {"loss": loss | {"off_policy_divergence": "forward_kl"}, "arms": {"arm": changes}}
    assert words in model_card(tmp_path, "arm", 20, "org/name", config, False, "float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "it is to answer as its base answers with it. The loss is L_distill (jsd) + 0 L_anchor + 0 L_retain."),
        ({"teacher": {"path": "org/large"}}, "it is to answer as its teacher answers with it."),
        ({"lora": {"init": "first"}}, "as its base, with the adapter that training began with, answers with it."),
        ({"loss": {"teacher": "ema"}}, "it is to answer as the moving average of its own weights answers with it."),
        ({"loss": {"reference": 0.1}}, "0 L_retain + 0.1 KL(student || teacher, both without a context)."),
    ],
)
def test_the_model_card_names_the_teacher_and_every_term(changes, words, tmp_path):
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    config = {"arms": {"arm": {}}, **changes, "loss": loss | changes.get("loss", {})}
    assert words in model_card(tmp_path, "arm", 20, "org/name", config, False, "float32")


def test_the_model_card_names_the_prompts_fields_that_are_not_the_defaults(tmp_path):
    loss = {"divergence": "jsd", "beta": 0.0, "mu": 0.0, "on_policy_fraction": 1.0, "off_policy_steps": 0}
    prompt = json.loads(base.get_config().prompt.to_json())
    config = {"loss": loss, "arms": {"arm": {}}, "prompt": prompt}
    assert "prompt." not in model_card(tmp_path, "arm", 20, "org/name", config, False, "float32").split("## Results")[0]
    config["prompt"] = prompt | {"thinking": False, "keywords": ["reasoning_effort=low"]}
    card = model_card(tmp_path, "arm", 20, "org/name", config, False, "float32")
    assert '\nprompts: prompt.thinking = false, prompt.keywords = ["reasoning_effort=low"]; ' in card


def test_flips_of_every_model_stand_in_their_cells(page):
    found = {}
    for part in page[0].split('<div class="panel">')[1:]:
        if 'class="flip"' in part.split("</table>")[0]:
            rows = [cells(row) for row in re.findall(r"<tr.*?</tr>", part.split("</table>")[0], flags=re.DOTALL)]
            found[re.search(r"<code>(.*?)</code>", part)[1]] = rows
    assert list(found) == list(MODELS)
    for model, (head, right, wrong) in found.items():
        flips = {name: f"{count} {100 * count / 400:.1f} %" for name, count in RESULTS[model]["flips"].items()}
        assert head == ["", "right with", "wrong with"]
        assert right == ["right without", flips["right_right"], flips["right_wrong"]]
        assert wrong == ["wrong without", flips["wrong_right"], flips["wrong_wrong"]]


@pytest.mark.parametrize("arm", ARMS)
def test_curves_of_every_arm_are_its_dev_rows_in_the_colours_of_their_views(page, arm):
    rows, found = metric_rows(arm), lines(page[1][f"Accuracy of {arm} in both views over the training steps"])
    for name, key in (("bare", "dev/acc_x"), ("context", "dev/acc_xc"), ("obedience", "dev/obedience")):
        assert found.pop(colour(name)) == points(rows, key, 100)
    (target,) = found.values()
    assert [height for _, height in target] == pytest.approx([100 * RESULTS["base"]["acc_xc"]] * 2)
    found = lines(page[1][f"Training losses of {arm}"])
    assert found == {colour(key): points(rows, key, 1) for key in ("loss", "distill", "anchor", "retain")}


@pytest.mark.parametrize("key", ["harm", "obedience"])
def test_bars_and_their_whiskers_are_the_rates_and_intervals_of_their_models(page, key):
    (axes,) = (axes for label, axes in page[1].items() if label.startswith("Harm" if key == "harm" else "obedience"))
    assert [text.get_text() for text in axes.get_yticklabels()] == list(MODELS)
    bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches}
    expected = {place: 100 * RESULTS[model][key] for place, model in enumerate(MODELS)}
    assert bars == pytest.approx(expected)
    whiskers = [line.get_data() for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]]
    found = {int(heights[0]): list(ends) for ends, heights in whiskers}
    for place, model in enumerate(MODELS):
        assert found[place] == pytest.approx([100 * end for end in RESULTS[model][f"{key}_ci"]])


@pytest.mark.parametrize("model", MODELS)
def test_lengths_cosines_and_positions_are_those_of_their_model(page, model):
    axes = page[1][f"Response lengths of {model} in both views"]
    outlines = {to_hex(patch.get_edgecolor()): patch for patch in axes.patches if not patch.get_fill()}
    for view in ("bare", "context"):
        lengths = [row["length"] for row in item_rows(model) if row["view"] == view]
        xy = outlines[colour(view)].get_xy()
        high = sorted({(x, y) for x, y in xy if y > 0})
        assert min(x for x, _ in high) == min(lengths) - 0.5 and max(x for x, _ in high) == max(lengths) + 0.5
    found = lines(page[1][f"Cosine by layer of {model}"])
    for name, key in (("mean", COSINES[0]), ("centred", COSINES[1]), ("control", COSINES[2])):
        assert found[colour(name)] == [pytest.approx(point) for point in enumerate(RESULTS[model][key])]
    (band,) = page[1][f"Cosine by layer of {model}"].collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.round(6)}
    for key in (COSINES[0], COSINES[3]):
        assert {(layer, round(value, 6)) for layer, value in enumerate(RESULTS[model][key])} <= corners
    found = lines(page[1]["View KL by response position, one line per arm"])
    own = found[to_hex(plots.arm_style(MODELS.index(model))[0])]
    assert own == [pytest.approx((place + 1, kl)) for place, kl in enumerate(RESULTS[model]["view_kl_by_position"])]


def test_legends_name_the_views_by_the_colours_that_their_lines_have(page):
    entries = re.findall(r"<span>(<svg class=\"swatch\".*?</svg>)\s*(.*?)</span>", page[0], flags=re.DOTALL)
    found = {name: re.search(r'stroke="(#\w+)"', key)[1].lower() for key, name in entries}
    names = {
        "without context": "bare", "with context": "context", "obeys other contexts": "obedience", "centred": "centred",
        "with against without context": "mean", "control: with another context": "control", "distill": "distill",
        "loss": "loss", "anchor": "anchor", "retain": "retain",
    }  # fmt: skip
    assert {name: found[name] for name in names} == {name: colour(style) for name, style in names.items()}
    for place, model in enumerate(MODELS):
        assert found[model] == to_hex(plots.arm_style(place)[0])


def test_responses_stand_under_their_arm_and_view_with_their_own_marks(page):
    samples = page[0].split('<div class="sample">')[1:]
    assert len(samples) == 4
    for sample in samples:
        number = int(re.search(r"q(\d)</div>", sample)[1])
        assert sample.index("without the context") < sample.index("with the context")
        found = re.findall(r'<pre class="(right|wrong)">(.*?)</pre>\s*<p[^>]*>(.*?)</p>', sample)
        rows = [row for model in MODELS for row in item_rows(model) if row["id"] == f"q{number}"]
        rows = [row for row in rows if row["view"] in ("bare", "context")]
        assert [text for _, text, _ in found] == [row["text"] for row in rows]
        for (level, _, mark), row in zip(found, rows):
            assert level == ("right" if row["correct"] else "wrong")
            assert f"{row['length']} tokens" in mark and ("cut at the limit" in mark) == row["truncated"]


def test_obedience_by_context_is_that_of_its_context_and_arm(page):
    head, rows = table(page[0], "<th>responses</th>")
    assert head == ["context", "responses", *(f"{model}  %" for model in MODELS)]
    for context, row in rows.items():
        pairs = [RESULTS[model]["obedience_by_context"][context] for model in MODELS]
        assert row[1:] == [str(pairs[0][1]), *(f"{100 * rate:.1f}" for rate, _ in pairs)]
    assert list(rows) == ["Speak French.", "Shout."]


def test_no_two_arms_have_the_same_line_or_the_same_key(monkeypatch):
    count, drawn = 24, []
    monkeypatch.setattr(plots, "_svg", lambda figure, label: drawn.append(figure.axes[0]) or "")
    plots.position_lines({str(arm): [0.1 * arm, 0.2, 0.3] for arm in range(count)}, "")
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn[0].lines]
    assert len(set(looks)) == count == len({plots.swatch(plots.arm_style(arm)) for arm in range(count)})
    assert looks[:6] == [(colour, dash, "") for colour, dash in plots.ARM_STYLES]
