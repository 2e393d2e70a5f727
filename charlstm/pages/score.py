"""Write scored texts as a page, coloured by surprise."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.evaluation.score import Scored
from charlstm.evaluation.surprise import Predictions
from charlstm.evaluation.units import Piece, split_units
from charlstm.pages.embed import write_page
from charlstm.runs.folder import Run

MAX_CHARS = 200_000  # of all texts; a browser takes some seconds for as many


def write_score_page(texts: Iterable[Scored], run: Run, by: str, out: epath.PathLike) -> None:
    """Write one page with all texts and the predictions of their characters.

    Args:
      texts: as score_texts yields them.
      run: the run that predicts them.
      by: what the page is coloured by at first: 'char', 'word' or 'line'.
      out: the file to write; a page may be replaced.

    Raises:
      UserError: as score_texts and write_page do, and if there are more than MAX_CHARS characters.
    """
    described, num_chars = list[dict[str, Any]](), 0
    for text in texts:
        pieces = list[Piece]()
        for piece in text.pieces:
            pieces.append(piece)
            num_chars += len(piece.text)
            if num_chars > MAX_CHARS:
                raise UserError(
                    f"{text.name}: a page has at most {MAX_CHARS:,} characters of all texts; give "
                    "shorter texts, or another --format"
                )
        described.append(_describe(text, pieces))
    data = {
        "run": run.workdir.name,
        "by": by,
        "characters": list(run.vocab.characters),
        "end": END if run.cleaning.separator else None,
        "texts": described,
    }
    write_page("score.html", data, out)


def _describe(text: Scored, pieces: list[Piece]) -> dict[str, Any]:
    """Return the data of a text: characters, numbers per character, and ends of its units."""
    parts = (piece.predictions for piece in pieces)
    found = Predictions(*map(np.concatenate, zip(*parts, strict=True)))
    return {
        "name": text.name,
        "text": "".join(piece.text for piece in pieces),
        "total": text.totals.metrics(),
        # Decimals that the page shows; NaN becomes null.
        "bits": found.bits_M.astype(np.float64).round(3),
        "entropy": found.entropy_M.astype(np.float64).round(2),
        "rank": found.rank_M,
        "top_ids": found.top_ids_MK,
        "top_probs": found.top_probs_MK.astype(np.float64).round(3),
        "word_ends": _ends(pieces, "word"),
        "line_ends": _ends(pieces, "line"),
    }


def _ends(pieces: list[Piece], by: str) -> np.ndarray:
    return np.cumsum([len(unit.text) for unit in split_units(pieces, by)])
