"""Random keys by name: every random number of a run comes from (seed, stream, epoch, position)."""

import jax

# A stream's number is part of every result: append, never renumber.
STREAMS = {"init": 0, "order": 1, "augment": 2, "mix": 3, "dropout": 4}


def stream_key(seed, stream, epoch=0):
    """Return the key of one stream of one epoch; seed and epoch may be traced int32/uint32 scalars."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), epoch)


def example_keys(key, positions):
    """Return one key per example, [N], from an epoch's key and positions int32 [N] in the epoch."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
