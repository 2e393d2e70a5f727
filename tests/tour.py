"""A tour of charlstm for programmers: your own loop, loss, seeds, head, probe and files.

python tests/tour.py
"""

import tempfile
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import charlstm as cl
from charlstm.evaluation import linear_probe, record_states, text_features
from charlstm.exchange import safetensors
from charlstm.exchange.folder import as_trained
from charlstm.runs.checkpoints import load_model

# A text, the characters in it, and a config of a small plain LSTM, which compiles fast.
text = "\n".join(topics[name] for name in ("for", "if", "class", "function", "with", "while"))
vocab, config = cl.Vocab.from_text(text), cl.base_config()
config.model.update({"hidden_size": 32, "recurrence": "fused", "dropout_rate": 0.0})
config.model.update({"multiplicative": False, "recurrent_rms_norm": False})
config.batch_size, config.seq_len = 16, 24
model, optimizer = cl.model_from_config(config, vocab), optax.adam(1e-2)

# All batches of 60 steps, with a leading axis S. A batch is a function of the number of the step.
batches_S = cl.training_batches(vocab.encode(text), config)(np.arange(60))


# Your own loss, one number per character: here label smoothing.
def smoothed(logits_BTV, batch):
    """Return nats_BT, whose mean make_train_step minimises."""
    targets_BTV = optax.smooth_labels(jax.nn.one_hot(batch.targets_BT, len(vocab)), 0.1)
    return optax.softmax_cross_entropy(logits_BTV, targets_BTV)


# Your own loop: train_step is pure, thus jax.lax.scan runs all steps as one compiled program.
def train(loss, seed):
    """Return the last state, and the loss of each step."""
    state = cl.init_state(model, optimizer, jax.random.key(seed), config.batch_size)
    step = cl.make_train_step(model, optimizer, loss=loss)
    state, metrics_S = jax.lax.scan(step, state, batches_S)
    return state, metrics_S["loss"]


# Several seeds at once: jax.vmap adds an axis R to the whole training.
states_R, losses_RS = jax.jit(jax.vmap(partial(train, smoothed)))(jnp.arange(3))
for seed, losses_S in enumerate(losses_RS):
    print(f"seed {seed}: loss {losses_S[0]:.3f} at step 0, {losses_S[-1]:.3f} at the last")

# A trained model in the package, and its states after each character: h_MH of the only layer.
run, reader, reader_params = load_model("builtin")
ids_M = run.vocab.encode(text, unknown="drop")[:8000]
states_MH = record_states(reader, reader_params, ids_M)[0].h_BTH

# Your own head: is the next character in no word? Logistic regression on the states, by optax.
text_M = run.vocab.decode(ids_M)
outside_M = jnp.array([not char.isalnum() for char in text_M[1:]], jnp.float32)


def head_loss(head):
    """Return the mean nats of `outside_M`."""
    logits_M = states_MH[:-1] @ head["kernel_H"] + head["bias"]
    return optax.sigmoid_binary_cross_entropy(logits_M, outside_M).mean()


def update(carry, _):
    """Return (head, optimizer state) after one step on all characters, and the loss before it."""
    head, opt_state = carry
    nats, grads = jax.value_and_grad(head_loss)(head)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(head, updates), opt_state), nats


head = {"kernel_H": jnp.zeros(states_MH.shape[1]), "bias": jnp.zeros(())}
_, head_losses_S = jax.jit(lambda carry: jax.lax.scan(update, carry, length=100))(
    (head, optimizer.init(head))
)
print(f"head: loss {head_losses_S[0]:.3f} at step 0, {head_losses_S[-1]:.3f} at the last")

# A linear probe: what the states hold, beside the same probe on a control task.
features = text_features(text_M)
probed = {name: features[name] for name in ("inside quotation marks", "position in line")}
probes = linear_probe(states_MH, probed)
for name, probe in probes.items():
    print(f"{name}: {probe.measure} {probe.score:.3f}, control {probe.control:.3f}")

# Export the first seed and load it again, as every launcher does with --workdir=FILE.
params = jax.tree.map(lambda leaf_R: leaf_R[0], states_R.params)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mine.safetensors"
    safetensors.export(as_trained(config, vocab, params), path)
    _, loaded, loaded_params = load_model(path)

ids_BT = vocab.encode(text[:200])[None]
logits_BTV, loaded_BTV = (
    jax.jit(cl.predict, static_argnums=0)(m, p, ids_BT, cl.zero_carry(m, 1))[0]
    for m, p in ((model, params), (loaded, loaded_params))
)
print(f"logits after export: off by {np.abs(logits_BTV - loaded_BTV).max():.1e} at most")
