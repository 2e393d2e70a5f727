"""The picture of a training run."""

import io
from collections.abc import Iterable
from typing import Any


def draw_curves(records: Iterable[dict[str, Any]], title: str) -> bytes:
    """Return a PNG of bits per character over steps and over seconds.

    Args:
      records: the objects of a metrics.jsonl.
      title: stands above the picture.
    """
    # Imported here, since it takes as long as a hundred training steps.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [{k: v for k, v in record.items() if v is not None} for record in records]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "step"), (right, "seconds")):
        for name, label, style in (
            ("train/bits_per_char", "training (with dropout)", {"linewidth": 1, "alpha": 0.8}),
            ("val/bits_per_char", "validation", {"linewidth": 2, "marker": "o", "markersize": 4}),
        ):
            points = [(record[key], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set_xlabel({"step": "steps", "seconds": "seconds"}[key])
        axes.grid(alpha=0.3)
    left.set_ylabel("bits per character")
    best = min((r["val/bits_per_char"] for r in records if "val/bits_per_char" in r), default=None)
    if best is not None:
        right.axhline(best, color="black", linewidth=0.8, linestyle="--", label=f"best {best:.3f}")
    left.set_ylim(*_limits([v for r in records for k, v in r.items() if "bits_per_char" in k]))
    right.legend()
    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _limits(values: list[float]) -> tuple[float, float]:
    # The first steps of an untrained model would press all that follows into a line.
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    top = min(high, low + 2.5)
    return max(0.0, low - 0.1), max(top, low + 0.1)
