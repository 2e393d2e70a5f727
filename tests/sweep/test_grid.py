import json

import pytest

from charlstm.config import base_config
from charlstm.errors import UserError
from charlstm.sweep import grid, texts


def test_combinations_are_ordered_and_draws_are_nested():
    varied = grid.parse_sets(["batch_size=8,16", "model.hidden_size=64,128,256"])
    every = grid.combine(varied)
    assert [tuple(settings.values()) for settings in every[:4]] == [
        (8, 64),
        (8, 128),
        (8, 256),
        (16, 64),
    ]
    assert len(every) == 6
    few, more = (grid.combine(varied, number) for number in (2, 4))
    assert len(few) == 2
    assert all(settings in more for settings in few)
    assert [settings for settings in every if settings in more] == more
    assert grid.combine(varied, 6) == every
    assert grid.combine({}) == [{}]


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"batch_size": []}, "batch_size"),
        ({"batch_size": [8, 8]}, "batch_size=8,8: has a value twice"),
        ({"model.hiden_size": [8]}, "did you mean"),
    ],
)
def test_invalid_values_are_refused(varied, message):
    with pytest.raises(UserError, match=message):
        grid.check_varied(varied)


@pytest.mark.parametrize("number", [0, 3])
def test_impossible_number_of_combinations_is_refused(number):
    with pytest.raises(UserError, match=f"--combinations={number}: must be from 1 to 2"):
        grid.combine({"batch_size": [8, 16]}, number)


def test_trial_has_all_settings_and_a_unique_name():
    config = base_config()
    config.seed, config.data.path, config.num_steps = 5, "book.txt", 7
    combinations = [{"batch_size": 8, "seq_len": 32}, {"seq_len": 32, "batch_size": 16}]
    trials = grid.make_trials(config, combinations, ["a", "b"], [0, 1])
    assert [(t.seed, t.config.batch_size, t.text) for t in trials[:4]] == [
        (0, 8, "a"),
        (0, 8, "b"),
        (0, 16, "a"),
        (0, 16, "b"),
    ]
    assert len({trial.name for trial in trials}) == 8
    assert trials[-1].config.seed == 1
    assert trials[0].config.num_steps == 7
    assert trials[0].config.data.val_fraction == texts.VAL_FRACTION
    assert config.data.val_fraction == 0.1
    reordered = trials[0]._replace(settings={"seq_len": 32, "batch_size": 8})
    assert reordered.name == trials[0].name


def test_only_seeds_and_values_may_be_added_to_a_sweep(tmp_path):
    path, config = tmp_path / "sweep.json", base_config()

    def shared(seeds, **settings):
        return grid.shared_settings(grid.make_trials(config, [settings], ["a"], seeds))

    first = shared([0], batch_size=8)
    grid.refuse_other_sweep(path, first)
    path.write_text(json.dumps(first))
    grid.refuse_other_sweep(path, shared([1], batch_size=16))
    with pytest.raises(UserError, match="it varies batch_size"):
        grid.refuse_other_sweep(path, shared([0], seq_len=8))
    config.data.lowercase = True
    with pytest.raises(UserError, match=r"data\.lowercase is False there and True here"):
        grid.refuse_other_sweep(path, shared([0], batch_size=8))
