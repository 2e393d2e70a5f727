"""Write a page that shows what a run did, what its units learnt, and how far to trust its figures.

  python launch/report.py --workdir=runs/default-pg345 [--compare=DIR,DIR] [--out=FILE]

The page is one HTML file that needs no network and no server. It has the bits per character beside
baselines, the curves of training, samples, a held-out page coloured by surprise and by the state of
any unit, calibration, and copies of the training text. --compare adds the curves of other runs.
Sections that need what a run does not have, such as its text, are left out, and the page says so.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import UserError
from charlstm.system.paths import given_path

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
COMPARE = flags.DEFINE_list("compare", [], "run folders whose curves are added")
OUT = flags.DEFINE(options.ANY_PATH, "out", "", "the file to write; WORKDIR/report.html if none")


def main() -> None:
    """Write the report and print its path."""
    workdir = folders.trained_workdir(WORKDIR.value)
    if "" in COMPARE.value:
        raise UserError(f"--compare={','.join(COMPARE.value)}: has an empty name; give run folders")
    compare = [folders.trained_workdir(given_path(other)) for other in COMPARE.value]
    from charlstm.pages.report import write_report  # it imports JAX

    print(write_report(workdir, compare, OUT.value))


if __name__ == "__main__":
    app.run(main, "--workdir=runs/default-pg345 --out=default.html")
