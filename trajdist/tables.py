"""Counts, durations and the tables about phases, as commands print them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from trajdist.files import GIB

# Rows of a table: by name, what makes the text of a cell out of a phase's figures.
Cells = dict[str, Callable[[dict[str, Any]], str]]


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 shard``, ``2,000 shards``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary_table(summary: dict[str, dict[str, Any]]) -> Table:
    """The table at the end of a run, one column per phase, or per domain where it had several."""
    columns: dict[str, dict[str, Any]] = {}
    for phase, figures in summary.items():
        domains = figures.get("domains", {})
        columns |= {f"{phase} {name}": own for name, own in domains.items()} if domains else {phase: figures}
    return phase_table("trajdist", _SUMMARY, columns)


def phase_table(title: str, rows: Cells, phases: dict[str, dict[str, Any]]) -> Table:
    """One column per phase; rows that are empty for all of them are left out."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    for name, cell in rows.items():
        cells = [cell(phase) for phase in phases.values()]
        if any(cells):
            table.add_row(name, *cells)
    return table


_SUMMARY: Cells = {
    "images": lambda s: f"{s['images']:,}",
    "unusable images": lambda s: f"{s['failures']:,}",
    "epochs": lambda s: f"{s['epochs']:,}",
    "steps": lambda s: f"{s['steps']:,}",
    "processes": lambda s: f"{s['num_processes']}",
    "trained weights": lambda s: f"{s['trained_parameters']:,}",
    "first loss": lambda s: f"{s['first_loss']:.4f}",
    "final loss": lambda s: f"{s['final_loss']:.4f}",
    "images/s": lambda s: f"{s['images_per_s']:.1f}",
    "time": lambda s: format_seconds(s["seconds"]),
    "peak memory": lambda s: f"{s['peak_memory_bytes'] / GIB:.2f} GiB",
    "memory growth": lambda s: f"{s['memory_growth_bytes'] / 2**20:+.1f} MiB",
}
