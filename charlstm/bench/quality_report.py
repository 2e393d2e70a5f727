"""Summarize, tabulate and plot the points of bench.py's quality section."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from charlstm.bench.quality import DEFAULT, KERAS
from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = (2.5, 2.3, 2.2, 2.1, 2.0)  # bits per character
TUTORIALS = ("tutorial", KERAS)
COLORS = {DEFAULT: "C0", "default": "C1", "tutorial": "C3", KERAS: "C2"}

Point = Mapping[str, Any]  # step, seconds, bits_per_char


def seconds_to(points: Sequence[Point], bits: float) -> float | None:
    """Return the seconds of the first point with no more than `bits`, None where there is none."""
    return next((each["seconds"] for each in points if each["bits_per_char"] <= bits), None)


def work_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many characters a training step predicts, and the time steps for each of them."""
    if config["data"]["loss_on"] == "last":
        return config["batch_size"], config["seq_len"]
    return config["batch_size"] * config["seq_len"], 1


def summarise(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured of a contender, with the figures that the table shows.

    `predictions_per_second` counts training characters between the first point and the last, None
    where there is one only.
    """
    points = measured["points"]
    predictions, time_steps = work_of(measured["config"])
    first, last = points[0], points[-1]
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    return dict(measured) | {
        "time_steps_per_prediction": time_steps,
        "predictions_per_second": predictions * steps / seconds if seconds else None,
        "seconds_to": {str(bits): seconds_to(points, bits) for bits in TARGETS},
    }


def compare(contenders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return where each tutorial stood at its end, and when the default had as few bits.

    The default is the one that reads the same characters. `default_seconds` and `ratio` are None if
    it never had so few.
    """
    by_name = {each["contender"]: each for each in contenders}
    compared = []
    for name in TUTORIALS:
        if name not in by_name:
            continue
        last = by_name[name]["points"][-1]
        seconds = seconds_to(by_name[DEFAULT]["points"], last["bits_per_char"])
        ratio = last["seconds"] / seconds if seconds else None
        figures = {"seconds": last["seconds"], "bits_per_char": last["bits_per_char"]}
        compared.append({"of": name, "default_seconds": seconds, "ratio": ratio} | figures)
    return compared


def show_quality(console: Console, contenders: Sequence[Mapping[str, Any]]) -> None:
    """Print when each contender had which figure, and the sentences that belong to it."""
    console.print("Seconds from the command to so many held-out bits per character", style="bold")
    table = Table(box=box.ASCII2)
    table.add_column("contender")
    for name in (*map(str, TARGETS), "stood at", "after s", "chars/s", "steps/char"):
        table.add_column(name, justify="right")
    for each in contenders:
        last, speed = each["points"][-1], each["predictions_per_second"]
        table.add_row(
            each["contender"],
            *(_number(each["seconds_to"][str(bits)], ".1f") for bits in TARGETS),
            f"{last['bits_per_char']:.3f}",
            f"{last['seconds']:,.0f}",
            _number(speed, ",.0f"),
            str(each["time_steps_per_prediction"]),
        )
    console.print(table)
    for line in notes(contenders):
        console.print(f"  {line}", soft_wrap=True)
    console.print()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes(contenders: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sentences below the table."""
    lines = [
        "-: not reached. The seconds are those of the first checkpoint that had it; "
        "checkpoints are scored after the training, off the clock.",
        "chars/s: predicted and learnt from; steps/char: time steps computed for each of them.",
        "All read the text lower-cased but 'default': with its capitals it is harder to predict.",
    ]
    lines += [f"{each['contender']}: scored on {each['scored']}" for each in contenders]
    by_name = {each["contender"]: each for each in contenders}
    default = by_name[DEFAULT]
    for name in TUTORIALS:
        if name in by_name and (line := cost_line(by_name[name], default)):
            lines.append(line)
    return lines + [comparison_line(each) for each in compare(contenders)]


def cost_line(tutorial: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Return what a prediction costs the tutorial, '' where a speed is not known."""
    speeds = [each["predictions_per_second"] for each in (tutorial, default)]
    if None in speeds:
        return ""
    name, steps = tutorial["contender"], tutorial["time_steps_per_prediction"]
    return (
        f"{name}: one prediction for {steps} time steps. It learnt from {speeds[0]:,.0f} "
        f"characters a second ({steps * speeds[0]:,.0f} time steps), the default from "
        f"{speeds[1]:,.0f}, {speeds[1] / speeds[0]:,.0f} times as many."
    )


def comparison_line(compared: Mapping[str, Any]) -> str:
    """Return a comparison in words."""
    stood = (
        f"{compared['of']} stood at {compared['bits_per_char']:.3f} bits per character after "
        f"{compared['seconds']:,.1f} s"
    )
    if compared["ratio"] is None:
        return f"{stood}, and the default never had so few on the same characters."
    return (
        f"{stood}; the default had as few on the same characters after "
        f"{compared['default_seconds']:,.1f} s, {compared['ratio']:,.1f} times sooner."
    )


def draw_quality(contenders: Sequence[Mapping[str, Any]], about: str) -> bytes:
    """Return a PNG of bits per character over seconds, a curve for each contender."""
    return png(lambda figure: _draw(figure, contenders, about), 9, 6)


def _draw(figure: "Figure", contenders: Sequence[Mapping[str, Any]], about: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    figure.suptitle(f"Held-out bits per character since the command\n{about}")
    axes = figure.subplots()
    for each in contenders:
        seconds, bits = (
            [point[name] for point in each["points"]] for name in ("seconds", "bits_per_char")
        )
        name = each["contender"]
        axes.plot(seconds, bits, label=name, color=COLORS[name], marker="o", markersize=3)
    for target in TARGETS:
        axes.axhline(target, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("seconds")
    axes.set_ylabel("bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
