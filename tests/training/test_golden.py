"""A short run of the default recipe reaches a bound of its validation loss."""

import random
from itertools import accumulate

import numpy as np
import pytest
from etils import epath

from charlstm.config import base_config
from charlstm.runs.metrics import read_records
from charlstm.training.loop import train

# Bits per character. The bound is 0.02 above the loss of the recipe.
LARGEST_MEAN = 1.685
# A lower loss would mean that validation text was trained on.
LEAST_MEAN = 1.5


def made_up_text(num_chars):
    """Return sentences of 400 made-up words; each word has 12 possible successors."""
    chooser = random.Random(0)
    syllables = [
        consonant + vowel
        for consonant in "bcdfghklmnprstvw"
        for vowel in ("a", "e", "i", "o", "u", "an", "er", "il")
    ]
    words = [
        "".join(chooser.choices(syllables, k=chooser.choice((1, 2, 2, 3)))) for _ in range(400)
    ]
    followers = [chooser.sample(range(400), 12) for _ in words]
    weights = list(accumulate(1 / rank for rank in range(1, 13)))
    word, sentences, size = 0, [], 0
    while size < num_chars:
        chosen = []
        for _ in range(chooser.randint(4, 14)):
            [word] = chooser.choices(followers[word], cum_weights=weights)
            chosen.append(words[word])
        sentence = " ".join(chosen).capitalize() + chooser.choice("..!?") + chooser.choice("  \n")
        sentences.append(f"“{sentence.strip()}”\n" if chooser.random() < 0.2 else sentence)
        size += len(sentences[-1])
    return "".join(sentences)


# test_entropy.py trains the recipe in the ordinary suite.
@pytest.mark.slow
def test_default_recipe_learns_a_made_up_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(made_up_text(300_000), encoding="utf-8")
    found = []
    for seed in range(2):
        config = base_config()
        config.update_from_flattened_dict(
            {
                "data.path": str(path),
                "model.hidden_size": 64,
                "num_steps": 600,
                "eval_every_steps": 600,
                "seed": seed,
                "mesh.data": 1,
            }
        )
        workdir = epath.Path(tmp_path / str(seed))
        assert train(config, workdir)
        records = read_records(workdir / "metrics.jsonl")
        found.append(records[-1]["val/bits_per_char"])
    assert LEAST_MEAN < np.mean(found) < LARGEST_MEAN, found
