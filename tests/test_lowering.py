"""Without a GPU, all programs lower for one, and a step with cuDNN compiles."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import ShapeDtypeStruct, export
from jax.experimental import rnn
from jax.sharding import SingleDeviceSharding

from charlstm import Batch, CharLSTM, init_state, make_eval_step, make_sampler, make_train_step
from charlstm.optim import make_optimizer, make_schedule
from charlstm.planning.topology import topology_devices
from charlstm.steps import make_train_steps
from configs import gpu

V, B, T, S, P = 20, 4, 6, 2, 5


def batch_of(*lead):
    ids = ShapeDtypeStruct((*lead, B, T), jnp.int32)
    weights = ShapeDtypeStruct(ids.shape, jnp.float32)
    return Batch(ids, ids, weights, ShapeDtypeStruct((*lead, B), bool))


# In float32 with the recurrence in C++, which has no place in these programs.
@pytest.mark.parametrize(("dtype", "recurrence"), [("bfloat16", "fused"), ("float32", "native")])
def test_steps_and_sampler_of_gpu_config_lower_for_gpus(dtype, recurrence):
    config = gpu.get_config()
    config.model.update(hidden_size=8, dtype=dtype, recurrence=recurrence)
    model = CharLSTM(V, **config.model.to_dict())
    optimizer = make_optimizer(config, make_schedule(config, 10))
    make_state = partial(init_state, model, optimizer, batch_size=B)
    state = jax.eval_shape(make_state, jax.random.key(0))
    steps = make_train_steps(make_train_step(model, optimizer))
    programs = [
        (steps, (state, batch_of(S), S)),
        (make_eval_step(model), (state.params, state.carry, batch_of())),
        (
            partial(make_sampler(model, 3), temperature=0.8, top_k=5, repetition_penalty=1.0),
            (state.params, ShapeDtypeStruct((B, P), jnp.int32), jax.random.key(0)),
        ),
    ]
    for function, arguments in programs:
        lower = export.export(jax.jit(function), platforms=["cuda", "rocm"])
        module = lower(*arguments).mlir_module()
        assert "custom_call" not in module
        # The operands of each product have the type of the model's computations.
        products = re.findall(r"dot_general .*: \(tensor<(.*?)>, tensor<(.*?)>\)", module)
        kinds = {operand.split("x")[-1] for pair in products for operand in pair}
        assert kinds == {"bf16" if dtype == "bfloat16" else "f32"}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs JAX's plugin for CUDA: pip install -e '.[cuda-compiler]'",
)
def test_step_with_cudnn_compiles_for_a_gpu(monkeypatch):
    # cuDNN computes these sizes on a GPU. They only set the length of the workspace.
    name = "compute_rnn_workspace_reserve_space_sizes"
    monkeypatch.setattr(rnn.gpu_rnn, name, lambda *_: (1024, 2048), raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = CharLSTM(V, 8, 2, recurrence="cudnn", dropout_rate=0.1)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(partial(init_state, model, optimizer, batch_size=B), jax.random.key(0))
    sharding = SingleDeviceSharding(topology_devices("h100:1")[0])
    step = jax.jit(make_train_step(model, optimizer), in_shardings=sharding)
    text = step.lower(state, batch_of()).compile().as_text()
    calls = re.findall(r'custom_call_target="(cudnn_rnn\w*)"', text)
    assert sorted(calls) == 2 * ["cudnn_rnn_bwd_ffi"] + 2 * ["cudnn_rnn_ffi"]
