"""Makes the report of a sweep: reads its folder, writes `report.html` and `report.md`."""

from __future__ import annotations

from raysweep.report.markdown import render_markdown
from raysweep.report.page import render_page
from raysweep.report.run_files import read_run
from raysweep.storage.copies import location
from raysweep.storage.paths import write_atomically


def write_report(place: str) -> str:
    """Writes both files; returns the location of the sweep's folder.

    Args:
        place: folder of a sweep, or the URI of a bucket.

    Raises:
        RaysweepError: there is no leaderboard, or the storage cannot be used.
    """
    run = read_run(place)
    write_atomically(run.paths.report_html, render_page(run))
    write_atomically(run.paths.report_md, render_markdown(run))
    return location(run.paths.root)
