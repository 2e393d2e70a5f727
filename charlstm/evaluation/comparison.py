"""Compare two recipes by the losses of their runs on the same characters.

There are two units of replication, thus two standard errors of one difference:

blocks  The difference of the same runs on other text of the same kind. Both sides predict the same
        characters, so that the differences of blocks are paired: a passage that is hard for both
        does not count as noise.
runs    The difference of other runs of the same recipes, with other seeds, on the same text. It
        needs several runs of each recipe; the blocks of one run cannot show it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.scipy.special import betainc
from rich.table import Table

from charlstm.config import flatten
from charlstm.data.batches import Batch
from charlstm.errors import UserError
from charlstm.evaluation.measure import HeldOut, open_held_out
from charlstm.evaluation.passes import stateful_pass
from charlstm.evaluation.report import check_finite
from charlstm.evaluation.scoring import LossSums, standard_error, sum_losses
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import Run
from charlstm.system.tables import plain_text

LEVEL = 0.05  # p-values below it exceed the noise between seeds
# Settings in which the runs of one recipe may differ, besides sample.*.
NO_RECIPE = {
    *("seed", "data.path", "model.recurrence", "mesh.data"),
    *("checkpoint_every_steps", "log_every_steps"),
}
COMPARED_CHARS = 2**20  # decoded at once


class WelchTest(NamedTuple):
    """Welch's t-test of the difference of two means."""

    standard_error: float
    t: float
    degrees_of_freedom: float
    p_value: float  # two-sided


def welch_test(ours_R: np.ndarray, theirs_S: np.ndarray) -> WelchTest | None:
    """Return Welch's t-test of the means of two samples, whose variances may differ.

    Welch 1947, 'The generalization of Student's problem when several different population variances
    are involved'. None if a sample has fewer than two values, or if no values differ.
    """
    if min(len(ours_R), len(theirs_S)) < 2:
        return None
    parts = [float(np.var(sample, ddof=1)) / len(sample) for sample in (ours_R, theirs_S)]
    if not (variance := sum(parts)):
        return None
    t = float(np.mean(ours_R) - np.mean(theirs_S)) / math.sqrt(variance)
    sizes = len(ours_R), len(theirs_S)
    freedom = variance**2 / sum(
        part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True)
    )
    # The probability of a larger |t| in Student's distribution.
    p_value = float(betainc(freedom / 2, 0.5, freedom / (freedom + t**2)))
    return WelchTest(math.sqrt(variance), t, freedom, p_value)


def compare_losses(ours: Sequence[LossSums], theirs: Sequence[LossSums]) -> dict[str, Any]:
    """Return the difference of two recipes in bits per character, ours minus theirs.

    Args:
      ours, theirs: the losses of the runs of each recipe, in the same blocks of the same text.

    Returns:
      'difference', of the means over runs; 'standard_error' over blocks, None for a single block;
      'between_seeds', a WelchTest as a dict, None with fewer than two runs of a recipe.
    """
    means_K, per_run = [], []
    for side in (ours, theirs):
        bits_RK = np.stack([sums.nats_K / sums.count_K for sums in side]) / math.log(2)
        means_K.append(bits_RK.mean(axis=0))
        per_run.append(np.array([sums.loss for sums in side]) / math.log(2))
    test = welch_test(*per_run)
    return {
        "difference": float(per_run[0].mean() - per_run[1].mean()),
        "standard_error": standard_error(means_K[0] - means_K[1]),
        "between_seeds": None if test is None else test._asdict(),
    }


def compare_runs(
    ours: Sequence[epath.PathLike],
    theirs: Sequence[epath.PathLike],
    *,
    checkpoint: str = "best",
    path: str = "",
    unknown: str = "error",
) -> dict[str, Any]:
    """Return the metrics of two recipes on one text, as launch/evaluate.py --compare prints them.

    Args:
      ours, theirs: the folders of the runs of each recipe, which differ in config.seed only.
      checkpoint: 'best' or 'latest'.
      path, unknown: the text, as for open_held_out.

    Raises:
      UserError: if a run or the text cannot be read, if the runs of one side are not one recipe, or
        if two runs predict different characters.
      RunError: if a loss is not finite.
    """
    opened = []
    for workdir in (*ours, *theirs):
        run, model, params = load_model(workdir, checkpoint)
        held_out = open_held_out(run, path, unknown, with_training_part=False)
        opened.append((run, held_out, stateful_pass(model, params, run.config, held_out.ids_M)))
    runs = [run for run, _, _ in opened]
    for side in (runs[: len(ours)], runs[len(ours) :]):
        _check_recipe(side)
    for run, held_out, _ in opened[1:]:
        _check_same_text(runs[0], opened[0][1], run, held_out)
    # Runs on windows predict nothing in the first one.
    first = max(scored.first for _, _, scored in opened)
    num_chars = len(opened[0][1].ids_M) - first
    sums = [
        sum_losses(_without(scored.run(held_out.ids_M), first - scored.first), num_chars, None)
        for _, held_out, scored in opened
    ]
    rows = [
        {
            "workdir": str(run.workdir),
            "seed": run.config.seed,
            "bits_per_char": losses.loss / math.log(2),
        }
        for run, losses in zip(runs, sums, strict=True)
    ]
    for row in rows:
        check_finite(row, row["workdir"])
    return {
        "text": opened[0][1].name,
        "characters": num_chars,
        "blocks": len(sums[0].nats_K),
        "runs": rows[: len(ours)],
        "compared": rows[len(ours) :],
        **compare_losses(sums[: len(ours)], sums[len(ours) :]),
    }


def format_comparison(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a comparison, given the result of compare_runs."""
    yield f"text           {metrics['text']}"
    yield f"characters     {metrics['characters']}"
    yield ""
    table = Table("", "run", box=None, pad_edge=False)
    for title in ("seed", "bits/char"):
        table.add_column(title, justify="right")
    for name, key in (("A", "runs"), ("B", "compared")):
        for row in metrics[key]:
            cells = row["workdir"], str(row["seed"]), f"{row['bits_per_char']:.4f}"
            table.add_row(name, *cells)
    yield plain_text(table)
    yield ""
    difference, error = metrics["difference"], metrics["standard_error"]
    yield f"A - B          {difference:+.4f} bits/char"
    if error is not None:
        yield (
            f"+- {error:.4f}      between {metrics['blocks']} blocks of the text, paired: the same "
            "runs on other text"
        )
    if (test := metrics["between_seeds"]) is None:
        yield (
            "The noise between seeds is unknown: give several runs of A and of B that differ in "
            "config.seed only."
        )
        return
    counts = f"{len(metrics['runs'])} and {len(metrics['compared'])} runs"
    yield f"+- {test['standard_error']:.4f}      between {counts}: other seeds on the same text"
    verb = "exceeds" if test["p_value"] < LEVEL else "does not exceed"
    yield (
        f"The difference {verb} the noise between seeds: p = {test['p_value']:.2g}, Welch's t-test "
        f"over runs, t = {test['t']:.2f}, {test['degrees_of_freedom']:.1f} degrees of freedom."
    )


def _without(outputs: Iterable[tuple[Batch, Any]], count: int) -> Iterator[tuple[Batch, Any]]:
    """Yield the outputs of a pass with weight 0 for the first `count` characters that it scores."""
    for batch, output in outputs:
        weights_BT = np.asarray(batch.weights_BT)
        counted_BT = weights_BT > 0
        place_BT = np.cumsum(counted_BT).reshape(counted_BT.shape)  # from 1
        yield batch._replace(weights_BT=np.where(place_BT > count, weights_BT, 0)), output
        count = max(0, count - int(counted_BT.sum()))


def _check_recipe(runs: Sequence[Run]) -> None:
    """Raise UserError unless `runs` are replications: the same settings and different seeds."""
    first, settings = runs[0], flatten(runs[0].config)
    for run in runs[1:]:
        differing = [
            f"{key} is {settings[key]!r} and {value!r}"
            for key, value in flatten(run.config).items()
            if value != settings[key] and key not in NO_RECIPE and not key.startswith("sample.")
        ]
        if differing:
            raise UserError(
                f"{first.workdir} and {run.workdir}: are on one side and differ in more than the "
                f"seed ({'; '.join(differing)}); give runs of one recipe on each side"
            )
    seeds = [run.config.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        names = ", ".join(str(run.workdir) for run in runs)
        raise UserError(
            f"{names}: are on one side and have the seeds {', '.join(map(str, seeds))}; give runs "
            "of different config.seed, since only these show the noise between seeds"
        )


def _check_same_text(run: Run, held_out: HeldOut, other: Run, theirs: HeldOut) -> None:
    """Raise UserError unless two runs predict the same characters, whatever their ids are."""
    problem = f"{len(held_out.ids_M):,} and {len(theirs.ids_M):,} characters"
    if len(held_out.ids_M) == len(theirs.ids_M):
        for start in range(0, len(held_out.ids_M), COMPARED_CHARS):
            span = slice(start, start + COMPARED_CHARS)
            texts = run.vocab.decode(held_out.ids_M[span]), other.vocab.decode(theirs.ids_M[span])
            if texts[0] != texts[1]:
                pairs = enumerate(zip(*texts, strict=True), start)
                place, pair = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
                problem = f"{pair[0]!r} and {pair[1]!r} at character {place:,}"
                break
        else:
            return
    raise UserError(
        f"{run.workdir} and {other.workdir}: predict different characters ({problem}), and their "
        "bits per character cannot be compared; give one --text=FILE, and runs with the same "
        "config.data.lowercase, strip_punctuation, min_count and document_separator"
    )
