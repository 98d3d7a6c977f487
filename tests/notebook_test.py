"""The notebook, executed as it is, on a base so small that nothing is learnt."""

import os
from pathlib import Path
import re

import nbclient
import nbformat
import pytest

PATH = Path(__file__).parents[1] / "notebooks" / "quickstart_tpu.ipynb"
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


def test_the_committed_notebook_has_no_outputs_and_defines_no_functions(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert not any(word in cell.source for cell in cells for word in ("def ", "lambda", "class "))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))  # the base is not kept
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]), prepend=os.pathsep)
    place = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("MODEL ="))
    cells = [*notebook.cells]
    cells.insert(place + 1, nbformat.v4.new_code_cell(SMALLER.format(workdir=str(tmp_path / "run"))))
    small = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    client = nbclient.NotebookClient(small, timeout=600, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in small.cells for output in cell.get("outputs", []))
    assert "A tiny base is trained instead" in printed and "memory of a chip" in printed
    assert "opcd_anchored, step 2" in printed and printed.count("without: ") == 8
    assert (tmp_path / "run" / "run" / "report.html").exists()


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
