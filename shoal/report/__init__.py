"""Tables, plots and an HTML page from run folders: baseline beside reduced, Pareto fronts, and the papers' figures."""

from shoal.report.accounting import gated_macs
from shoal.report.plots import plot_anytime, plot_budget, plot_comparison, plot_curves, plot_pareto
from shoal.report.record import Record, read
from shoal.report.tables import comparison, comparison_table, flat_row, write_csv

__all__ = [
    "Record",
    "comparison",
    "comparison_table",
    "flat_row",
    "gated_macs",
    "plot_anytime",
    "plot_budget",
    "plot_comparison",
    "plot_curves",
    "plot_pareto",
    "read",
    "write_csv",
]
