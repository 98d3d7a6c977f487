"""Tables, plots and one self-contained `report.html` of a run that compares arms of context distillation."""

import pathlib

from ctxjax.report.tables import results_table

__all__ = ["results_table", "write_report"]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir/report.html` and returns its path; see `ctxjax.report.page.write_report`."""
    # Imported on first use: a training job that only prints the table never loads matplotlib.
    from ctxjax.report import page

    return page.write_report(workdir)
