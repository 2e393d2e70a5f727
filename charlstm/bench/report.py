"""Show measurements in tables and pictures."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from charlstm.bench.cases import Case
from charlstm.bench.timing import LIMIT
from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {
    "batch_size": "B, sequences in a batch",
    "seq_len": "T, time steps",
    "hidden_size": "H, hidden units",
    "num_layers": "N, layers",
    "vocab_size": "V, vocabulary size",
}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of dicts that have the same keys."""
    rows = list(rows)
    shown = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(rows[0]):
        shown.add_column(name, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*map(form, row.values()))
    console = Console(width=110, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def form(value: Any) -> str:
    """Return a number with about four digits, a text unchanged, and a dash for None."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def timing_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of cases and backends."""
    for result in results:
        case = result["case"]
        label = "{task} {batch_size}x{seq_len}x{hidden_size} V={vocab_size} N={num_layers}"
        for name, timing in result["results"].items():
            low, high = timing.get("quartile_seconds", (math.nan, math.nan))
            yield {
                "task BxTxH": label.format(**case),
                "backend": name,
                "ms": 1e3 * timing.get("median_seconds", math.nan),
                "quartiles": f"{1e3 * low:.3g} to {1e3 * high:.3g}",
                "chars/s": timing.get("characters_per_second"),
                "time / ours": timing.get("time_over_ours"),
                "of limit": timing.get("share_of_limit"),
                "peak MiB": timing.get("peak_bytes", math.nan) / 2**20,
            }


def size_picture(results: Sequence[Mapping[str, Any]], base: Case, machine: str) -> bytes:
    """Return a PNG of the time per character over each size, the others as in `base`."""

    def draw(figure: "Figure") -> None:
        figure.suptitle(f"Time per character of a training step around {base}\n{machine}")
        panels = figure.subplots(2, 3)
        for axes, (size, label) in zip(panels.flat, SIZES.items(), strict=False):
            others = SIZES.keys() - {size}
            points = [
                each
                for each in results
                if all(each["case"][name] == getattr(base, name) for name in others)
            ]
            points.sort(key=lambda each: each["case"][size])
            for name in points[0]["results"]:
                timed = [each for each in points if "error" not in each["results"][name]]
                axes.plot(
                    [each["case"][size] for each in timed],
                    [1e6 / each["results"][name]["characters_per_second"] for each in timed],
                    linestyle="--" if name == LIMIT else "-",
                    label=name,
                    marker=".",
                )
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds per character")
            axes.grid(alpha=0.3, which="both")
        panels.flat[-1].axis("off")
        panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center")

    return png(draw, 12, 7)
