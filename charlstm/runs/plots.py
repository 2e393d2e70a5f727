"""Pictures as PNG files, and the curves of a training run."""

import io
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from charlstm.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The value of Software in the metadata of our PNG files.
SOFTWARE = "charlstm"
MAX_POINTS = 2000


def png(draw: "Callable[[Figure], None]", width: float, height: float) -> bytes:
    """Return a figure of `width` by `height` inches, drawn by `draw`, as a PNG.

    The user's settings of Matplotlib are ignored.
    """
    matplotlib = _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
    picture = io.BytesIO()
    with matplotlib.rc_context(defaults), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters missing in a font
        figure = Figure(figsize=(width, height), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.print_png(picture, metadata={"Software": SOFTWARE})
    return picture.getvalue()


def _import_matplotlib() -> Any:
    # Imported late, because it is slow; and without the user's backend, because the import fails if
    # that is not available.
    backend = os.environ.get("MPLBACKEND")
    others = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    # For Python only: XLA's threads call getenv, and a change of the environment of the process
    # at that moment is a segmentation fault.
    with patch.object(os, "environ", others):
        import matplotlib
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def is_ours(picture: bytes) -> bool:
    """Return whether `picture` is a PNG drawn by png()."""
    return f"Software\0{SOFTWARE}".encode() in picture[:1000]


def draw_curves(records: Sequence[dict[str, Any]], title: str) -> bytes:
    """Return a PNG of bits per character over steps and over seconds.

    Args:
      records: of metrics.jsonl. A curve shows at most MAX_POINTS of them.
      title: any text.
    """
    training, validation = (
        thinned([record for record in records if record.get(name) is not None], name)
        for name in ("train/bits_per_char", "val/bits_per_char")
    )
    return png(lambda figure: _draw(figure, training, validation, title), 11, 4.2)


def _draw(
    figure: "Figure",
    training: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    title: str,
) -> None:
    figure.suptitle(printable(title), parse_math=False)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "step"), (right, "seconds")):
        for records, name, label, style in (
            (training, "train/bits_per_char", "training (with dropout)", {"alpha": 0.8}),
            (validation, "val/bits_per_char", "validation", {"marker": "o", "markersize": 4}),
        ):
            if records:
                columns = ([record[column] for record in records] for column in (key, name))
                axes.plot(*columns, label=label, linewidth=1 + (records is validation), **style)
        axes.set_xlabel({"step": "steps", "seconds": "seconds"}[key])
        axes.grid(alpha=0.3)
    left.set_ylabel("bits per character")
    values = [record["train/bits_per_char"] for record in training]
    if scores := [record["val/bits_per_char"] for record in validation]:
        best = min(scores)
        right.axhline(best, color="black", linewidth=0.8, linestyle="--", label=f"best {best:.3f}")
    left.set_ylim(*_limits(values + scores))
    if training or validation:
        right.legend()


def thinned(
    records: Sequence[dict[str, Any]], name: str, size: int = MAX_POINTS
) -> list[dict[str, Any]]:
    """Return at most `size` of `records`: the minimum and maximum of `name` in each interval."""
    if len(records) <= size:
        return list(records)
    num_intervals = size // 2
    bounds = [len(records) * index // num_intervals for index in range(num_intervals + 1)]
    chosen = []
    for begin, end in itertools.pairwise(bounds):
        interval = sorted(range(begin, end), key=lambda index: records[index][name])
        chosen += sorted({interval[0], interval[-1]})
    return [records[index] for index in chosen]


def _limits(values: list[float]) -> tuple[float, float]:
    # The first steps would compress the rest of the curve to a line.
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    top = min(high, low + 2.5)
    return max(0.0, low - 0.1), max(top, low + 0.1)
