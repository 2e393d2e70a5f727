"""Export a model's steps as StableHLO by jax.export, for processes with JAX and without charlstm.

The programs take and return dicts of arrays, since the NamedTuples of charlstm and optax are not
known there. In a dict of parameters or of an optimizer's state, the name of an array is its path.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax import export as jax_export
from safetensors.numpy import save

from charlstm.data.batches import Batch
from charlstm.exchange.folder import Trained, describe, write_folder
from charlstm.exchange.safetensors import WEIGHTS
from charlstm.exchange.weights import flatten, shapes_of
from charlstm.model import Carry, CharLSTM
from charlstm.optim import averaged_params, make_optimizer
from charlstm.runs.folder import Run
from charlstm.sampling import make_sampler
from charlstm.steps import TrainState, init_state, make_eval_step, make_train_step
from charlstm.system.extras import import_extra

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".jax_export"
Arrays = dict[str, Any]

_FILES = """
- `model.safetensors`: the weights, in float32.
- `init_state.jax_export`, `train_step.jax_export`, `eval_step.jax_export`, `sample.jax_export`:
  programs of `jax.export` for CPU, CUDA and TPU.
"""
_LOADING = """
With jax, flatbuffers, safetensors and NumPy, without charlstm:

```python
import json

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


def load(name):
    with open(f"OUT/{{name}}.jax_export", "rb") as file:
        return jax.jit(export.deserialize(bytearray(file.read())).call)


params = load_file("OUT/model.safetensors")
with open("OUT/vocab.json", encoding="utf-8") as file:
    characters = json.load(file)
with open("OUT/prompts.json", encoding="utf-8") as file:
    prompts = json.load(file) or characters
key = jax.random.key_data(jax.random.key(0, impl="{impl}"))

# Continue B prompts of at most P characters.
prompt_BP = np.array([[characters.index(char) for char in prompts[0]]], np.int32)
lengths_B = np.array([len(row) for row in prompt_BP], np.int32)
settings = {{"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}}
ids_BL = np.array(load("sample")(params, prompt_BP, lengths_B, key, settings))
print("".join(characters[index] for index in ids_BL[0]))

# Train on B rows of T characters. Rows of your own text belong here.
inputs_BT, targets_BT = ids_BL[:, :-1], ids_BL[:, 1:]
batch = {{
    "inputs_BT": inputs_BT,
    "targets_BT": targets_BT,
    "weights_BT": np.ones(inputs_BT.shape, np.float32),  # 0: not counted
    "reset_B": np.zeros(len(inputs_BT), bool),  # true: the row starts from a carry of zeros
}}
zeros_NBH = np.zeros(({num_layers}, len(inputs_BT), {hidden_size}), np.float32)
carry = {{"c": zeros_NBH, "h": zeros_NBH}}
state, train_step = load("init_state")(params, key), load("train_step")
for _ in range(5):
    # A text in order passes the carry on to its next window.
    state, next_carry, metrics = train_step(state, carry, batch, 1e-3)
params = {params}
_, totals = load("eval_step")(params, carry, batch)
print("nats per character:", totals["nats"] / totals["count"])
```

| program | arguments | results |
|---|---|---|
| `init_state` | params, key | state |
| `train_step` | state, carry, batch, learning_rate | state, carry, metrics |
| `eval_step` | params, carry, batch | carry, totals |
| `sample` | params, prompt_BP, lengths_B, key, settings | ids_BL |

| argument | content |
|---|---|
| params | the dict of `model.safetensors` |
| key | {key_type}, as `jax.random.key_data` returns it for keys of the implementation {impl} |
| state | a dict: `step`, `key`, and the dicts `params` and `opt_state` |
| carry | a dict: `c` and `h`, float32 [{num_layers}, B, {hidden_size}] |
| batch | a dict: ids int32, weights float32 [B, T], resets bool [B] |
| settings | a dict of numbers: `temperature`, `top_k`, `top_p`, `min_p` |

B, T and P may be any numbers{window}. L is {length}; a shorter text is the beginning of it. Ids are
0 to {last_id}. The optimizer and the dropout are those of `config.json`; the learning rate is an
argument. The flattened arguments of a program are its arrays in the order of the arguments, those
of a dict sorted by name; `in_tree` and `in_avals` of the deserialized program show them.

charlstm reads this folder in place of a run folder.
"""


def export(trained: Trained, out: epath.Path) -> None:
    """Write `trained` to the folder `out`.

    Raises:
      UserError: if the package flatbuffers is not installed, or if `out` cannot be written.
    """
    import_extra("flatbuffers", "stablehlo", "the format stablehlo")
    model, run = trained.model, trained.run
    key = jax.eval_shape(lambda: jax.random.key_data(run.key(0)))
    sample = run.config.sample
    average = _average_prefix(_abstract_state(model, run))
    loading = _LOADING.format(
        impl=run.prng_impl,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        params=f'{{name: state["opt_state"]["{average}" + name] for name in params}}'
        if average
        else 'state["params"]',
        key_type=f"{key.dtype} {list(key.shape)}",
        window=f", with P of at least {run.config.seq_len}" if sample.method == "window" else "",
        length=sample.length,
        last_id=model.vocab_size - 1,
    )
    texts = describe(trained, out, _FILES, loading)
    files = {WEIGHTS: save(flatten(trained.params))}
    for name, program in programs(model, run).items():
        files[name + SUFFIX] = bytes(program.serialize())
    write_folder(texts, files, out)


def programs(model: CharLSTM, run: Run) -> dict[str, jax_export.Exported]:
    """Return the programs `init_state`, `train_step`, `eval_step` and `sample` for any B, T and P.

    Each is for all PLATFORMS. The model card describes their arguments and results.
    """
    # The other recurrences can be custom calls, for which jax.export guarantees nothing.
    model = model.clone(recurrence="fused", num_shards=1)
    # A lower bound of P, since programs without P refuse a constraint on it.
    before = run.config.seq_len - 1 if run.config.sample.method == "window" else 0
    sizes = jax_export.symbolic_shape(f"B, T, P + {before}")
    given = _arguments(model, run, *sizes)
    return {
        name: jax_export.export(jax.jit(function), platforms=PLATFORMS)(
            *(given[argument] for argument in inspect.signature(function).parameters)
        )
        for name, function in _functions(model, run).items()
    }


def _functions(model: CharLSTM, run: Run) -> dict[str, Callable[..., Any]]:
    """Return the functions of the programs, by name; their arguments are those of _arguments."""
    like = _abstract_state(model, run)

    def init(params: Arrays, key: jax.Array) -> Arrays:
        optimizer, tree = _optimizer(run, 0.0), _unnamed(like.params, params)
        return _from_state(init_state(model, optimizer, _wrap(run, key), batch_size=1, params=tree))

    def train_step(
        state: Arrays, carry: Arrays, batch: Arrays, learning_rate: jax.Array
    ) -> tuple[Arrays, Arrays, Arrays]:
        step = make_train_step(model, _optimizer(run, learning_rate))
        before = TrainState(
            state["step"],
            _unnamed(like.params, state["params"]),
            _unnamed(like.opt_state, state["opt_state"]),
            _to_carry(carry),
            _wrap(run, state["key"]),
        )
        after, metrics = step(before, Batch(**batch))
        return _from_state(after), _from_carry(after.carry), metrics

    def eval_step(params: Arrays, carry: Arrays, batch: Arrays) -> tuple[Arrays, Arrays]:
        tree, step = _unnamed(like.params, params), make_eval_step(model)
        after, totals = step(tree, _to_carry(carry), Batch(**batch))
        return _from_carry(after), totals

    def sample(
        params: Arrays,
        prompt_BP: jax.Array,
        lengths_B: jax.Array,
        key: jax.Array,
        settings: Arrays,
    ) -> jax.Array:
        about, tree = run.config.sample, _unnamed(like.params, params)
        sampler = make_sampler(model, about.length, method=about.method, seq_len=run.config.seq_len)
        return sampler(tree, prompt_BP, _wrap(run, key), lengths_B=lengths_B, **settings)

    return {"init_state": init, "train_step": train_step, "eval_step": eval_step, "sample": sample}


def _arguments(model: CharLSTM, run: Run, batch_size: Any, length: Any, width: Any) -> Arrays:
    """Return the abstract arguments of all programs by name."""
    shape_BT, shape_B = (batch_size, length), (batch_size,)
    array = jax.ShapeDtypeStruct
    carry_NBH = array((model.num_layers, batch_size, model.hidden_size), jnp.float32)
    return {
        "params": _named(shapes_of(model)),
        "key": jax.eval_shape(lambda: jax.random.key_data(run.key(0))),
        "state": jax.eval_shape(_from_state, _abstract_state(model, run)),
        "carry": {"c": carry_NBH, "h": carry_NBH},
        "batch": {
            "inputs_BT": array(shape_BT, jnp.int32),
            "targets_BT": array(shape_BT, jnp.int32),
            "weights_BT": array(shape_BT, jnp.float32),
            "reset_B": array(shape_B, jnp.bool_),
        },
        "learning_rate": array((), jnp.float32),
        "prompt_BP": array((batch_size, width), jnp.int32),
        "lengths_B": array(shape_B, jnp.int32),
        "settings": {
            "temperature": array((), jnp.float32),
            "top_k": array((), jnp.int32),
            "top_p": array((), jnp.float32),
            "min_p": array((), jnp.float32),
        },
    }


def _abstract_state(model: CharLSTM, run: Run) -> TrainState:
    make = partial(init_state, model, _optimizer(run, 0.0), batch_size=1)
    return jax.eval_shape(make, run.key(0))


def _optimizer(run: Run, learning_rate: Any) -> optax.GradientTransformation:
    return make_optimizer(run.config, lambda count: learning_rate)


def _average_prefix(state: TrainState) -> str:
    """Return what precedes the names of the averaged parameters in `opt_state`, '' if none."""
    averaged = _named(averaged_params(state.params, state.opt_state))
    name, wanted = next(iter(averaged.items()))
    found = (path for path, leaf in _named(state.opt_state).items() if leaf is wanted)
    return next(found, "").removesuffix(name)


def _wrap(run: Run, key_data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key_data, impl=run.prng_impl)


def _from_state(state: TrainState) -> Arrays:
    """Return a state as dicts, without its carry."""
    return {
        "step": state.step,
        "params": _named(state.params),
        "opt_state": _named(state.opt_state),
        "key": jax.random.key_data(state.key),
    }


def _to_carry(arrays: Arrays) -> Carry:
    num_layers = arrays["c"].shape[0]
    return tuple((arrays["c"][index], arrays["h"][index]) for index in range(num_layers))


def _from_carry(carry: Carry) -> Arrays:
    c_NBH, h_NBH = map(jnp.stack, zip(*carry, strict=True))
    return {"c": c_NBH, "h": h_NBH}


def _named(tree: Any) -> Arrays:
    """Return the leaves of `tree` by path, such as 'lstm_0.hf.kernel'."""
    name_of = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _unnamed(like: Any, arrays: Arrays) -> Any:
    """Return the tree of `like` with the leaves of `arrays`."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])
