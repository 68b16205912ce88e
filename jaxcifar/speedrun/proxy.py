"""Data selection: a small network is trained first, and chooses the examples of every batch.

Source: the records of cifar10-airbench since arXiv 2404.00498 (airbench96_faster), from its facts:
a proxy of 32, 64 and 64 channels and two convolutions to a group sees the batches that the network
will see, in the same order and with the same augmentation; of each batch the half with the largest
losses is kept; the proxy takes a step, on that half, at every fourth batch, under the network's own
rates and without lookahead; its first layer's bias stays 0. Ours: partial batches at the end of an
epoch are dropped, where the original fills them from the next; the network's first bias is trained
for three epochs, as the original's settings say (its loop compares an epoch's number with a step's,
and goes on to the end).
"""

import jax.numpy as jnp
from jax import lax

from jaxcifar.speedrun import training


def step(run, state, prepared, seed, number):
    """Take the proxy's step `number` on what it keeps; return its State and int32 [keep].

    run: the network's training.Speedrun. state: the proxy's.
    """
    images, labels = training.batch(run.proxy, prepared, seed, number)
    return training.update(run.proxy, False, state, images, labels, number, run.keep)


def look(run, state, prepared, seed, number):
    """Return what the proxy keeps of batch `number`, without a step: int32 [keep]."""
    images, labels = training.batch(run.proxy, prepared, seed, number)
    losses, _ = training.losses(run.proxy, state.params, state, images, labels)
    return lax.top_k(losses, run.keep)[1]


def select(run, prepared, seed, images):
    """Train the proxy; return the places kept in every batch, int32 [steps, keep].

    images: uint8 [N, 32, 32, 3], to whiten. A rolled loop over groups of batches, of which the
    first is trained on.
    """
    every = run.config.speedrun.proxy_every

    def group(state, first):
        state, kept = step(run, state, prepared, seed, first)
        others = [look(run, state, prepared, seed, first + i) for i in range(1, every)]
        return state, jnp.stack([kept, *others])

    state = training.initial(run.proxy, seed, images)
    _, kept = lax.scan(group, state, jnp.arange(0, run.total_steps, every))
    return kept.reshape(-1, run.keep)[:run.total_steps]
