"""Measure how soon a recipe reaches a number of bits per character on a held-out text.

The seconds count from the start of a new process without compiled programs to a checkpoint.
Checkpoints stay in memory and are scored after the training, so that scoring takes none of its
time.
"""

import logging
import os
import runpy
import time
from collections.abc import Iterator, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from charlstm.bench.cases import Checkpoints
from charlstm.bench.timing import call, open_processes
from charlstm.cli import streams
from charlstm.config import base_config
from charlstm.errors import UserError, one_line
from charlstm.runs.plots import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("charlstm.bench")

TARGETS = (2.5, 2.3, 2.2, 2.1, 2.0)  # bits per character
SPACING = 1.1  # least ratio of the elapsed seconds of two checkpoints
REFERENCE = "default, lower-cased"  # reads the same characters as the tutorials


def recipes(text: str) -> dict[str, ConfigDict]:
    """Return the recipes to compare, on the text at a path; '' is Dracula."""
    configs = {REFERENCE: base_config(), "default": base_config()}
    configs[REFERENCE].data.lowercase = True
    path = os.path.join(streams.REPOSITORY, "configs", "tutorial.py")
    configs["tutorial"] = configs["keras"] = runpy.run_path(path)["get_config"]()
    configs["tutorial"].data.val_fraction = base_config().data.val_fraction
    for config in configs.values():
        config.data.path = text
    return configs


def measure_recipes(text: str, seconds: float, with_keras: bool) -> list[dict[str, Any]]:
    """Train the recipes for at most `seconds` each, one after another, and return the results.

    `seconds_to` are the seconds to each target, None where it is not reached; `reference_seconds`
    are those at which the default recipe reached the final bits per character of this one, if both
    read the same characters.
    """
    results: list[dict[str, Any]] = []
    for name, config in recipes(text).items():
        if name == "keras" and not with_keras:
            continue
        logger.info("quality: %s", name)
        result = {"name": name, "config": config.to_dict()} | train(name, config, seconds)
        points = result["points"]
        final = points[-1]["bits_per_char"] if points and config.data.lowercase else -1.0
        results.append(result)
        result["seconds_to"] = {str(bits): seconds_to(points, bits) for bits in TARGETS}
        result["reference_seconds"] = seconds_to(results[0]["points"], final)
    return results


def train(name: str, config: ConfigDict, seconds: float) -> dict[str, Any]:
    """Train in a new process; return the points, or none and an error."""
    backend = "keras" if name == "keras" else "jax"
    checkpoints = Checkpoints(time.time(), seconds, SPACING)
    with (
        TemporaryDirectory() as cache,
        open_processes([backend], JAX_COMPILATION_CACHE_DIR=cache) as processes,
    ):
        task = f"{backend}_backend.train", config.to_dict(), checkpoints
        try:
            return {"points": processes[backend].submit(call, *task).result()}
        except UserError:  # such as a text that cannot be read
            raise
        except Exception as error:
            logger.warning("%s failed: %s", name, one_line(error))
            return {"points": [], "error": one_line(error)}


def seconds_to(points: Sequence[Mapping[str, Any]], bits: float) -> float | None:
    """Return the seconds of the first point with at most `bits`, None if there is none."""
    return next((each["seconds"] for each in points if each["bits_per_char"] <= bits), None)


def rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table: seconds to each target, and bits per character at the end."""
    for result in results:
        last = result["points"][-1] if result["points"] else {}
        yield {
            "seconds to bits/char": result["name"],
            **result["seconds_to"],
            "end": last.get("bits_per_char"),
            "seconds": last.get("seconds"),
            "default": result["reference_seconds"],
        }


def picture(results: Sequence[Mapping[str, Any]], machine: str) -> bytes:
    """Return a PNG of bits per character over seconds."""

    def draw(figure: "Figure") -> None:
        figure.suptitle(f"Held-out bits per character since the start\n{machine}")
        axes = figure.subplots()
        for result in results:
            seconds, bits = (
                [point[key] for point in result["points"]] for key in ("seconds", "bits_per_char")
            )
            axes.plot(seconds, bits, label=result["name"], marker=".")
        axes.set(xscale="log", xlabel="seconds", ylabel="bits per character")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

    return png(draw, 9, 6)
