"""The paper part of scaling.py, and its picture."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from charlstm.planning import cost
from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "products": "tab:blue",
    "memory": "tab:orange",
    "latency": "tab:red",
    "outside": "tab:cyan",
    "update": "tab:purple",
    "all_reduce": "tab:green",
}
WORDS = {
    "products": "scan: products",
    "memory": "scan: kernel and state from memory",
    "latency": "scan: turns of the loop (assumed)",
    "outside": "products outside of the scan",
    "update": "Adam",
    "all_reduce": "all-reduce",
}


def on_paper(
    config: ConfigDict, vocab_size: int, chip: cost.Chip, rows_each: int, counts: Iterable[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the parts of a step on each number of chips: of one batch, and of `rows_each` a chip.

    A batch that has not a row for each chip is left out.
    """
    scaled = config.copy_and_resolve_references()
    paper: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for count in counts:
        for name, rows in (("strong", config.batch_size), ("weak", rows_each * count)):
            if rows < count:
                continue
            scaled.batch_size = rows
            step = cost.step_time(scaled, vocab_size, chip, count)
            rate = rows * config.seq_len / step.total
            about = {"chips": count, "rows": rows, "chars_per_second": rate, "total": step.total}
            paper[name].append(about | step._asdict())
    return paper


def draw(report: dict[str, Any], about: str) -> bytes:
    """Return a PNG of scaling.json: strong and weak scaling on paper, and virtual devices' work."""
    return png(lambda figure: _draw(figure, report, about), 13, 4.6)


def _draw(figure: "Figure", report: dict[str, Any], about: str) -> None:
    strong, weak, virtual = figure.subplots(1, 3)
    for axes, name in ((strong, "strong"), (weak, "weak")):
        rows = report["paper"][name]
        chips = [row["chips"] for row in rows]
        totals = [1e3 * row["total"] for row in rows]
        for part, colour in COLOURS.items():
            values = [(row["chips"], 1e3 * row[part]) for row in rows if row[part]]
            if values:
                axes.plot(*zip(*values, strict=True), color=colour, marker=".", label=WORDS[part])
        axes.plot(chips, totals, color="black", linewidth=2, label="a step")
        ideal = [totals[0] / n if name == "strong" else totals[0] for n in chips]
        axes.plot(chips, ideal, color="grey", linestyle="--", label="if all scaled")
        axes.set_ylim(min(totals) / 300, 2 * max(totals))
    kept = report["paper"]["strong"][0]["rows"]
    each = report["paper"]["weak"][0]["rows"]
    strong.set_title(f"on paper, {kept:,} rows for all ({about})", fontsize=9)
    weak.set_title(f"on paper, {each:,} rows for each", fontsize=9)
    for name, colour in (("strong", "tab:blue"), ("weak", "tab:orange")):
        outcomes = report["virtual"][name]
        devices = [outcome["num_devices"] for outcome in outcomes]
        rows = {"strong": "64 rows for all", "weak": "8 rows for each"}[name]
        for key, style, what in (("share", "-", "one device's"), ("work", ":", "all devices'")):
            seconds = [1e3 * outcome[f"{key}_seconds"] for outcome in outcomes]
            label = f"{rows}: {what} share" if key == "share" else f"{rows}: {what} work"
            virtual.plot(devices, seconds, style, color=colour, marker=".", label=label)
    virtual.set_title(f"measured here, 1 x 128, T = 32, on {os.cpu_count()} cores", fontsize=9)
    for axes in (strong, weak, virtual):
        axes.set(yscale="log", xlabel="devices")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    strong.set_ylabel("milliseconds a step")
    figure.legend(*weak.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    virtual.legend(fontsize=8)
