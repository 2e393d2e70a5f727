"""Show results of the benchmark in tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from charlstm.bench.cases import Case
from charlstm.runs.plots import png
from charlstm.system.tables import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ("batch_size", "seq_len", "hidden_size", "num_layers", "vocab_size")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the numbers and names in results, without lists and dicts."""
    shown = Table(box=box.SIMPLE_HEAD)
    values = {key: value for result in results for key, value in result.items()}
    keys = [key for key, value in values.items() if not isinstance(value, list | dict)]
    for key in keys:
        shown.add_column(key.replace("_", " "), justify="right" if key != keys[0] else "left")
    for result in results:
        shown.add_row(*(format_cell(result.get(key)) for key in keys))
    return plain_text(shown)


def format_cell(value: Any) -> str:
    """Return a number with about four digits, a text unchanged, and a dash for None."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def size_picture(results: Sequence[Mapping[str, Any]], base: Case) -> bytes:
    """Return a PNG of the time per character over each size, the others as in `base`."""

    def draw(figure: "Figure") -> None:
        figure.suptitle(f"Time per character around {base}")
        panels = figure.subplots(2, 3).flat
        working = [result for result in results if "error" not in result]
        for axes, size in zip(panels, SIZES, strict=False):
            for name in dict.fromkeys(result["backend"] for result in working):
                points = sorted(
                    (result["sizes"][size], 1e6 / result["chars_per_second"])
                    for result in working
                    if result["backend"] == name
                    and Case(**result["sizes"] | {size: getattr(base, size)}) == base
                )
                axes.plot(*zip(*points, strict=True), label=name, marker=".")
            axes.set(xscale="log", yscale="log", xlabel=size, ylabel="microseconds per character")
            axes.grid(alpha=0.3, which="both")
        panels[-1].axis("off")
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")

    return png(draw, 12, 7)


def quality_picture(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of held-out bits per character over seconds."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for result in results:
            seconds, bits = (
                [p[key] for p in result["points"]] for key in ("seconds", "bits_per_char")
            )
            axes.plot(seconds, bits, label=result["recipe"], marker=".")
        axes.set(xscale="log", xlabel="seconds", ylabel="held-out bits per character")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

    return png(draw, 9, 6)
