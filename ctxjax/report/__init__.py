"""Tables, plots and one self-contained `report.html` of a run that compares arms of context distillation."""

from __future__ import annotations

import pathlib

from ctxjax.report.tables import results_table

__all__ = ["results_table", "write_report"]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Write ``workdir/report.html`` and return its path; see ``ctxjax.report.page.write_report``."""
    # Imported here, so that a program that only prints the table does not load matplotlib.
    from ctxjax.report import page

    return page.write_report(workdir)
