"""Pictures of results, their HTML report, and the graphs of programs.

`figures` draws with Matplotlib, `html_report` writes the page and the display in a
notebook, `graph` draws a program. The core asks for them through
`composeprob.rendering`.
"""

from composeprob.plotting.figures import (
    PALETTE,
    SIZES,
    log_density_at,
    new_figure,
    plot_density,
    plot_histograms,
    plot_images,
    plot_points,
    plot_result,
    style,
)
from composeprob.plotting.graph import graph_html, graph_source
from composeprob.plotting.html_report import display, report

__all__ = [
    "PALETTE",
    "SIZES",
    "display",
    "graph_html",
    "graph_source",
    "log_density_at",
    "new_figure",
    "plot_density",
    "plot_histograms",
    "plot_images",
    "plot_points",
    "plot_result",
    "report",
    "style",
]
