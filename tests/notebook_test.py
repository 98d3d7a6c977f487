"""The notebooks, executed as they are, the quickstart on a base so small that nothing is learnt."""

import json
import os
from pathlib import Path
import re
import sys

import matplotlib
from matplotlib import pyplot
import nbclient
import nbformat
import pytest

matplotlib.use("agg")
FOLDER = Path(__file__).parents[1] / "notebooks"
PATH = FOLDER / "quickstart_tpu.ipynb"
# Behind the notebook's own settings. The Hub is not asked, so the way without a network is taken.
SMALLER = """
MODEL, RANK, STEPS, BATCH, BASE_STEPS, WORKDIR = "no/such-model", 2, 2, 8, 2, Path({workdir!r})
from ctxjax.configs import tiny
config = tiny.get_config()
config.base.layers, config.base.width, config.base.head_dim, config.base.mlp_width = 1, 32, 8, 48
tiny.get_config = config.copy_and_resolve_references
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_committed_notebooks_have_no_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_the_quickstart_defines_no_functions(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(word in cell.source for cell in cells for word in ("def ", "lambda", "class "))


def execute(cells: list) -> str:
    """Execute the cells in the notebooks' folder; return what they print."""
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_badge_and_the_clone_name_one_repository(notebook):
    badge, *_ = notebook.cells
    (name,) = re.findall(r"\]\(https://colab\.research\.google\.com/github/([\w-]+/[\w.-]+)/blob/main/", badge.source)
    assert "(https://colab.research.google.com/assets/colab-badge.svg)]" in badge.source
    assert badge.source.count("/blob/main/notebooks/quickstart_tpu.ipynb)") == 1
    (source,) = (cell.source for cell in notebook.cells if "pip install" in cell.source)
    assert f'REPOSITORY = "{name}"' in source and "https://github.com/{REPOSITORY}" in source
    assert PATH.read_text().count(name) == 2


@pytest.mark.parametrize("extra", ["[tpu]", "[cuda]"])
def test_it_stops_with_one_sentence_if_jax_does_not_see_the_machines_accelerator(extra, notebook, monkeypatch, capsys):
    (source,) = (cell.source for cell in notebook.cells if "device_kind" in cell.source)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_PLATFORMS")
        with pytest.raises(SystemExit, match=rf"JAX sees only CPUs.*ctxjax\{extra}.*restart") as stopped:
            exec(source, {"extra": extra, "os": os, "sys": sys})
        assert str(stopped.value).count(".") == 1
        exec(source, {"extra": "", "os": os, "sys": sys})  # a runtime without an accelerator
    exec(source, {"extra": extra, "os": os, "sys": sys})  # CPUs are what was asked for
    assert capsys.readouterr().out.count("(cpu)") == 2


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))  # the base is not kept
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]), prepend=os.pathsep)
    place = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("MODEL ="))
    cells = [*notebook.cells]
    cells.insert(place + 1, nbformat.v4.new_code_cell(SMALLER.format(workdir=str(tmp_path / "run"))))
    printed = execute(cells)
    assert "A tiny base is trained instead" in printed and "memory of a chip" in printed
    assert "opcd_anchored, step 2" in printed and printed.count("without: ") == 8
    assert (tmp_path / "run" / "run" / "report.html").exists()

    curves = nbformat.read(FOLDER / "removability_curves.ipynb", as_version=4).cells
    (place,) = (i for i, cell in enumerate(curves) if cell.cell_type == "code" and "RUN = " in cell.source)
    curves.insert(place + 1, nbformat.v4.new_code_cell(f"RUN = Path({str(tmp_path / 'run' / 'run')!r})"))
    printed = execute(curves)
    assert "opcd_anchored    Acc_x" in printed and "answers are harmed in opcd_anchored" in printed


def test_the_line_of_the_curves_is_the_teachers_accuracy(tmp_path):
    (tmp_path / "opcd").mkdir()
    (tmp_path / "opcd" / "metrics.jsonl").write_text('{"step": 0, "dev/acc_x": 0.1, "dev/acc_xc": 0.3}\n')
    cells = nbformat.read(FOLDER / "removability_curves.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if "axhline" in cell.source)
    results = {"base": {"acc_xc": 0.3}, "opcd": {}}
    for target, more in ((30.0, {}), (90.0, {"teacher": {"acc_xc": 0.9}})):
        found = {"RUN": tmp_path, "json": json, "plt": pyplot, "arms": ["opcd"], "results": results | more}
        exec(source, found)
        assert list(found["axes"].lines[-1].get_ydata()) == [target, target]
        pyplot.close(found["figure"])


def test_each_of_several_samples_of_a_question_is_compared_with_its_own(tmp_path, capsys):
    (tmp_path / "opcd").mkdir()
    rights = {("bare", 0): True, ("context", 0): False, ("bare", 1): False, ("context", 1): True}
    items = [{"id": "a", "view": view, "sample": n, "text": f"{view} {n}", "correct": right}
             for (view, n), right in rights.items()]  # fmt: skip
    (tmp_path / "opcd" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    cells = nbformat.read(FOLDER / "removability_curves.ipynb", as_version=4).cells
    exec(cells[-1].source, {"RUN": tmp_path, "json": json, "arms": ["opcd"]})
    said = capsys.readouterr().out
    assert "1 of 2 answers are harmed in opcd" in said and "without: 'bare 0'   with: 'context 0'" in said


@pytest.mark.slow
def test_the_anatomy_agrees_with_the_library():
    """Its own assertions compare losses and gradients with those by hand."""
    cells = nbformat.read(FOLDER / "anatomy_of_a_step.ipynb", as_version=4).cells
    printed = execute(cells)
    assert "stop_gradient True: through q_x 0.0000" in printed and "nats per token, by hand" in printed


@pytest.mark.parametrize(
    ("devices", "extra"),
    [
        ("/dev/null /dev/vfio/vfio /dev/accel /dev/nvidiactl", ""),  # a CPU, with drivers
        ("/dev/null /dev/accel0 /dev/accel1", "[tpu]"),
        ("/dev/null /dev/vfio/vfio /dev/vfio/0", "[tpu]"),
        ("/dev/nvidia0 /dev/nvidiactl /dev/vfio/3", "[cuda]"),
    ],
)
def test_it_installs_what_the_machine_needs(devices, extra, notebook):
    (source,) = (cell.source for cell in notebook.cells if "pip install" in cell.source)
    (line,) = (line for line in source.splitlines() if line.lstrip().startswith("extra = "))
    assert eval(line.partition("=")[2], {"re": re, "devices": devices}) == extra and '".{extra}"' in source
