from etils import epath
from test_train import small_config

from charlstm.checkpoint import Checkpoints
from charlstm.job import prepare
from charlstm.journal import Journal
from charlstm.steps import evaluate


class OnDevice:
    """A number that tells when the host reads it."""

    def __init__(self, name, reads):
        self.name, self.reads = name, reads

    def __float__(self):
        self.reads.append(self.name)
        return 1.0


def test_training_metrics_are_read_one_step_late(book_path, tmp_path):
    job = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    reads = []
    checkpoints = Checkpoints(job.run.workdir)
    with Journal(job, checkpoints, 0, {}) as journal:
        for step in (1, 2, 3):
            assert step - 1 not in reads
            names = ("loss", "grad_norm", "count")
            journal.push(step, {name: OnDevice(step, reads) for name in names})
            assert set(reads) == set(range(1, step))
        journal.log_training(3, learning_rate=0.1)
        assert set(reads) == {1, 2, 3}
    checkpoints.close()


def test_evaluation_totals_are_read_one_batch_late():
    reads, batches = [], [1, 2, 3]

    def eval_step(params, carry, batch):
        assert batch - 1 not in reads
        return carry, {name: OnDevice(batch, reads) for name in ("nats", "correct", "count")}

    assert evaluate(eval_step, None, None, batches)["count"] == 3
    assert reads == [1, 1, 1, 2, 2, 2, 3, 3, 3]
