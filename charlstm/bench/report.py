"""Summarize, tabulate and plot the timings of bench.py."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from charlstm.bench.cases import Case
from charlstm.bench.race import Timing
from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = "matmul"  # the contender that stands for the matrix products alone
LABELS = {LIMIT: "products alone"}
TITLES = {
    "step": "Training step",
    "generate": "Generation, each character fed back",
    "evaluate": "Evaluation of a held-out text",
}
AXES = {
    "batch_size": "B, sequences in a batch",
    "seq_len": "T, time steps",
    "hidden_size": "H, hidden units",
    "num_layers": "N, layers",
    "vocab_size": "V, characters in the vocabulary",
}
COLORS = {"charlstm": "C0", "flax": "C1", "torch": "C3", "keras": "C2", LIMIT: "0.5"}


def product_flops(case: Case) -> float:
    """Return the floating-point operations of the matrix products that a training step must do.

    Of each layer: gates from the hidden state; of each layer but the first: gates from the layer
    below; then the dense layer. Each of them once forward and twice backward, for what came in
    and for the kernel. What one-hot vectors need, a lookup and a sum of rows, is no product.
    """
    rows, hidden_size = case.batch_size * case.seq_len, case.hidden_size
    gates = 2 * rows * hidden_size * 4 * hidden_size
    dense = 2 * rows * hidden_size * case.vocab_size
    return 3.0 * ((2 * case.num_layers - 1) * gates + dense)


def limit_timing(product: Timing, case: Case) -> Timing:
    """Return the products of a step of `case` at the rate at which one large product was done."""
    scale = product_flops(case) / product.value
    return product._replace(seconds=tuple(scale * seconds for seconds in product.seconds))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median ratio of what was measured in the same round.

    When the machine slows down for a while, both sides of a round slow down with it.
    """
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def summarise(timings: Mapping[str, Timing], case: Case) -> dict[str, Any]:
    """Return the figures of one case, as they stand in bench.json."""
    timings = dict(timings)
    if LIMIT in timings:
        timings[LIMIT] = limit_timing(timings[LIMIT], case)
    results = {}
    for name, timing in timings.items():
        low, median, high = quartiles(timing.seconds)
        results[name] = timing._asdict() | {
            "median_seconds": median,
            "quartile_seconds": [low, high],
            "min_seconds": min(timing.seconds),
            "characters_per_second": case.characters / median,
            "time_over_ours": paired_ratio(timing.seconds, timings["charlstm"].seconds),
        }
        if LIMIT in timings:
            share = paired_ratio(timings[LIMIT].seconds, timing.seconds)
            results[name]["share_of_limit"] = share
    return {"case": case._asdict() | {"characters": case.characters}, "results": results}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def show_races(console: Console, section: str, races: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a section, and below it what each contender was given."""
    first = races[0]["case"]
    sizes = f"V={first['vocab_size']}, N={first['num_layers']}"
    rounds = len(races[0]["results"]["charlstm"]["seconds"])
    console.print(
        f"{TITLES[section]} ({sizes}; medians of {rounds} interleaved rounds)", style="bold"
    )
    has_limit = LIMIT in races[0]["results"]
    table = Table(box=box.ASCII2)
    table.add_column("BxTxH" if section != "generate" else "texts x length x H")
    table.add_column("contender")
    for name in ("ms", "quartiles", "chars/s", "time / ours", "peak MiB"):
        table.add_column(name, justify="right")
    if has_limit:
        table.add_column("of limit", justify="right")
    for race in races:
        case = race["case"]
        label = f"{case['batch_size']}x{case['seq_len']}x{case['hidden_size']}"
        for name, result in race["results"].items():
            table.add_row(label, *_cells(name, result, has_limit))
            label = ""
        table.add_section()
    console.print(table)
    for name, result in races[-1]["results"].items():
        console.print(f"  {LABELS.get(name, name)}: {result['given']}", soft_wrap=True)
    console.print()


def _cells(name: str, result: Mapping[str, Any], has_limit: bool) -> list[str]:
    low, high = result["quartile_seconds"]
    cells = [
        LABELS.get(name, name),
        milliseconds(result["median_seconds"]),
        f"{milliseconds(low)}-{milliseconds(high)}",
        f"{result['characters_per_second']:,.0f}",
        f"{result['time_over_ours']:.2f}",
        # The products' process does no step, so that its memory means nothing.
        "" if name == LIMIT else f"{result['peak_bytes'] / 2**20:,.0f}",
    ]
    return [*cells, f"{result['share_of_limit']:.0%}"] if has_limit else cells


def summarise_loop(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the medians of `rounds`, and that of command / (start-up + bare steps)."""
    medians = {
        f"median_{name}": statistics.median(each[name] for each in rounds) for name in rounds[0]
    }
    ratio = paired_ratio(
        [each["command_seconds"] for each in rounds],
        [each["startup_seconds"] + each["bare_seconds"] for each in rounds],
    )
    return medians | {"command_over_startup_and_bare": ratio}


def show_loop(console: Console, steps: int, figures: Mapping[str, float]) -> None:
    """Print the table of the whole loop."""
    title = f"Whole loop: launch/train.py, {steps:,} steps with evaluations, samples, checkpoints"
    ratio = figures["command_over_startup_and_bare"]
    rows = {
        "the command, from start to end": f"{figures['median_command_seconds']:.2f} s",
        "its start-up, first step included": f"{figures['median_startup_seconds']:.2f} s",
        "the other steps, bare": f"{figures['median_bare_seconds']:.2f} s",
        "command / (start-up + bare steps)": f"{ratio:.3f}",
        "peak memory": f"{figures['median_peak_bytes'] / 2**20:,.0f} MiB",
    }
    show_figures(console, title, rows)


def show_figures(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a table of two columns."""
    console.print(title, style="bold")
    table = Table(box=box.ASCII2, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print()


def show_entropy(console: Console, learnt: Sequence[Mapping[str, Any]]) -> None:
    """Print how far from the entropy rate of each source a model is."""
    console.print("Held-out bits per character and the entropy rate, known exactly", style="bold")
    table = Table(box=box.ASCII2)
    table.add_column("source")
    for name in ("V", "entropy rate", "model", "above it", "characters read", "seconds"):
        table.add_column(name, justify="right")
    for row in learnt:
        table.add_row(
            row["source"],
            str(row["vocab_size"]),
            f"{row['entropy_rate']:.4f}",
            f"{row['bits_per_char']:.4f}",
            f"{row['excess']:.2%}",
            f"{row['characters_read']:,}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    console.print()


def milliseconds(seconds: float) -> str:
    """Return `seconds` in ms with about three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def draw_growth(races: Sequence[Mapping[str, Any]], base: Case, about: str) -> bytes:
    """Return a PNG of the time per character over each size, the other sizes as in `base`."""
    return png(lambda figure: _draw(figure, races, base, about), 12, 7)


def _draw(figure: "Figure", races: Sequence[Mapping[str, Any]], base: Case, about: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    figure.suptitle(f"Time per character of a training step\n{about}")
    panels = figure.subplots(2, 3)
    for axes, (size, label) in zip(panels.flat[:-1], AXES.items(), strict=True):
        points = [race for race in races if _varies_only(race["case"], base, size)]
        points.sort(key=lambda race: race["case"][size])
        values = [race["case"][size] for race in points]
        for name in points[0]["results"]:
            micros = [
                1e6 * race["results"][name]["median_seconds"] / race["case"]["characters"]
                for race in points
            ]
            style = {"linestyle": "--"} if name == LIMIT else {"marker": "o", "markersize": 4}
            axes.plot(values, micros, label=LABELS.get(name, name), color=COLORS[name], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("microseconds per character")
    panels.flat[-1].axis("off")
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center", fontsize=12)


def _varies_only(sizes: Mapping[str, Any], base: Case, size: str) -> bool:
    return all(sizes[name] == getattr(base, name) for name in AXES if name != size)
