"""Draw the results of scaling.py."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "products": "scan: products",
    "memory": "scan: residuals to and from memory",
    "latency": "scan: loop overhead",
    "outside": "products outside the scan",
    "update": "Adam",
    "all_reduce": "all-reduce",
    "total": "a step",
}
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(virtual: Results, computed: Results, compiled: Results, about: str) -> bytes:
    """Return a PNG of strong and weak scaling, computed and compiled, and of virtual devices."""

    kinds = "computed and compiled" if compiled else "computed"

    def draw_panels(figure: "Figure") -> None:
        panels = figure.subplots(1, 3)
        for axes, (name, rows) in zip(panels, computed.items(), strict=False):
            _draw_computed(axes, rows)
            if points := [(row["chips"], 1e3 * row["seconds"]) for row in compiled.get(name, ())]:
                label = "a step, compiled: the compiler's cycles"
                axes.plot(*zip(*points, strict=True), "kD", label=label)
            axes.set_title(f"{name} scaling, {kinds}: {about}", fontsize=8)
        for name, rows in virtual.items():
            devices = [row["num_devices"] for row in rows]
            for key, line in (("share", "-"), ("work", ":")):
                ms = [1e3 * row[f"{key}_seconds"] for row in rows]
                panels[2].plot(devices, ms, line, marker=".", label=f"{name}: {key} of devices")
        panels[2].set_title("virtual devices, measured", fontsize=9)
        panels[2].legend(fontsize=8)
        for axes in panels:
            axes.set(yscale="log", xlabel="devices", ylabel="milliseconds per step")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        lines = panels[1].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower left", ncols=4, fontsize=8)

    return png(draw_panels, 13, 4.6)


def _draw_computed(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    for part, label in LABELS.items():
        points = [(row["chips"], 1e3 * row[part]) for row in rows if row[part]]
        if points:
            width = 2 if part == "total" else 1
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=width, label=label)
    total = 1e3 * rows[0]["total"]
    ideal = [total * row["rows"] / rows[0]["rows"] / row["chips"] for row in rows]
    axes.plot([row["chips"] for row in rows], ideal, "--", color="grey", label="ideal")
    axes.set_ylim(min(ideal) / 300, 8 * max(row["total"] for row in rows) * 1e3)
