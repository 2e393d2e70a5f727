"""Measure how soon a recipe reaches a number of bits per character on a held-out text.

The seconds count from the start of a new process without compiled programs to a checkpoint.
Checkpoints stay in memory and are scored after the training, so that scoring takes none of its
time.
"""

import logging
import os
import runpy
import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from ml_collections import ConfigDict

from charlstm.bench.cases import Checkpoints
from charlstm.bench.timing import call, open_processes, try_run
from charlstm.cli import streams
from charlstm.config import base_config

logger = logging.getLogger("charlstm.bench")

TARGETS = (2.5, 2.3, 2.2, 2.1, 2.0)  # bits per character
SPACING = 1.1  # least ratio of the elapsed seconds of two checkpoints


def recipes(text: str, with_keras: bool) -> dict[str, ConfigDict]:
    """Return the recipes to compare, on the text at a path; '' is Dracula."""
    path = os.path.join(streams.REPOSITORY, "configs", "tutorial.py")
    configs = {"default, lower-cased": base_config(), "default": base_config()}
    for name in ("tutorial", "keras") if with_keras else ("tutorial",):
        configs[name] = runpy.run_path(path)["get_config"]()
        configs[name].data.val_fraction = base_config().data.val_fraction
    # The tutorial reads lower case, and only the first recipe predicts the same characters.
    configs["default, lower-cased"].data.lowercase = True
    for config in configs.values():
        config.data.path = text
    return configs


def measure_recipes(text: str, seconds: float, with_keras: bool) -> list[dict[str, Any]]:
    """Train the recipes for at most `seconds` each, one after another, and return the results.

    `default_seconds` are those at which the default recipe reached the final bits per character of
    this one, None if it did not, or if they do not predict the same characters.
    """
    results: list[dict[str, Any]] = []
    for name, config in recipes(text, with_keras).items():
        logger.info("quality: %s", name)
        backend = "keras" if name == "keras" else "jax"
        checkpoints = Checkpoints(time.time(), seconds, SPACING)
        with (
            TemporaryDirectory() as cache,
            open_processes([backend], JAX_COMPILATION_CACHE_DIR=cache) as processes,
        ):
            task = f"{backend}_backend.train", config.to_dict(), checkpoints
            points, error = try_run(name, processes[backend], call, *task)
        result = {"recipe": name, "config": config.to_dict(), "points": points or []}
        results.append(result)
        if error:
            result["error"] = error
            continue
        result |= {f"seconds_to_{bits}": seconds_to(points, bits) for bits in TARGETS}
        result |= {key: points[-1][key] for key in ("bits_per_char", "seconds")}
        if config.data.lowercase:
            default_seconds = seconds_to(results[0]["points"], result["bits_per_char"])
            result["default_seconds"] = default_seconds
    return results


def seconds_to(points: Sequence[Mapping[str, float]], bits: float) -> float | None:
    """Return the seconds of the first point with at most `bits`, None if there is none."""
    return next((each["seconds"] for each in points if each["bits_per_char"] <= bits), None)
