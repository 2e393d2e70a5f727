"""Run the benchmark cases with the fastest LSTM of torch."""

import os
from typing import Any

import torch
from torch import nn

from charlstm.bench.cases import TEMPERATURE, Call, Case, random_ids, timed, windows_of


class Model(nn.Module):
    """An LSTM on one-hot inputs. Time is the first axis, which is the layout of the kernel."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.vocab_size = case.vocab_size
        self.lstm = nn.LSTM(case.vocab_size, case.hidden_size, case.num_layers)
        self.dense = nn.Linear(case.hidden_size, case.vocab_size)

    def forward(self, ids_TB: Any, carry: Any) -> Any:
        """Return logits_TBV and the new carry."""
        one_hot_TBV = nn.functional.one_hot(ids_TB, self.vocab_size).float()
        hidden_TBH, carry = self.lstm(one_hot_TBV, carry)
        return self.dense(hidden_TBH), carry


def build(name: str, case: Case) -> Call:
    """Return the work of `case`."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    return {"train": _train, "generate": _generate, "evaluate": _evaluate}[case.task](case)


def use_fastest_threads(call: Call) -> None:
    """Use one thread or all, whichever runs `call` faster."""

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        call()
        return min(timed(call) for _ in range(3))

    torch.set_num_threads(min({1, os.cpu_count() or 1}, key=seconds))


def _train(case: Case) -> Call:
    model, carry = Model(case), None
    ids_TB = torch.tensor(random_ids(case).T).long()
    inputs_TB, targets_TB = ids_TB[:-1], ids_TB[1:].flatten()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def call() -> float:
        nonlocal carry
        logits_TBV, carry = model(inputs_TB, carry)
        carry = tuple(leaf.detach() for leaf in carry)
        loss = nn.functional.cross_entropy(logits_TBV.flatten(0, 1), targets_TB)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call


def _generate(case: Case) -> Call:
    # A call of nn.LSTMCell for one time step costs less than one of nn.LSTM.
    sizes = [case.vocab_size] + [case.hidden_size] * (case.num_layers - 1)
    cells = [nn.LSTMCell(size, case.hidden_size) for size in sizes]
    dense = nn.Linear(case.hidden_size, case.vocab_size)
    prompt_B = torch.tensor(random_ids(case)[:, 0]).long()

    @torch.inference_mode()
    def call() -> float:
        ids_B, generated = prompt_B, []
        carry: list[Any] = [None] * len(cells)
        for _ in range(case.seq_len):
            layer = nn.functional.one_hot(ids_B, case.vocab_size).float()
            for index, cell in enumerate(cells):
                carry[index] = cell(layer, carry[index])
                layer = carry[index][0]
            probs_BV = torch.softmax(dense(layer) / TEMPERATURE, dim=-1)
            ids_B = torch.multinomial(probs_BV, 1)[:, 0]
            generated.append(ids_B)
        return torch.stack(generated, dim=1).cpu().numpy().size

    return call


def _evaluate(case: Case) -> Call:
    model, ids_BM = Model(case), torch.tensor(random_ids(case)).long()

    @torch.inference_mode()
    def call() -> float:
        carry, nats, correct = None, 0.0, 0.0
        for ids_BT in windows_of(ids_BM, case):
            logits_TBV, carry = model(ids_BT[:, :-1].T, carry)
            logits_MV, targets_M = logits_TBV.flatten(0, 1), ids_BT[:, 1:].T.flatten()
            nats += nn.functional.cross_entropy(logits_MV, targets_M, reduction="sum").item()
            # Not used, but the JAX backends compute it too.
            correct += (logits_MV.argmax(-1) == targets_M).sum().item()
        return nats / case.characters

    return call
