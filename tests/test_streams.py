"""The random streams: their numbers are part of every result."""

import jax
import numpy as np
import pytest

from jaxcifar import streams

# Bits of the keys of seed 5, epoch 2. They stand for all results and run folders there are: a change
# here is one of every number that a run gives.
KEYS = {
    "init": (2682945473, 3744231012), "order": (1758636565, 1947230946),
    "augment": (1221879107, 2112273828), "mix": (189339284, 3564884309),
    "dropout": (2156205396, 2890310934),
}


@pytest.mark.parametrize("name", streams.STREAMS)
def test_a_stream_keeps_its_keys(name):
    bits = jax.random.key_data(streams.stream_key(5, name, 2))
    assert tuple(bits.tolist()) == KEYS[name]


def test_streams_epochs_seeds_and_examples_have_keys_of_their_own():
    keys = [streams.stream_key(seed, name, epoch)
            for seed in (0, 1) for name in streams.STREAMS for epoch in (0, 1)]
    examples = streams.example_keys(keys[0], np.arange(50, dtype=np.int32))
    bits = [tuple(jax.random.key_data(key).tolist()) for key in (*keys, *examples)]
    assert len(set(bits)) == len(bits)


def test_an_examples_key_depends_on_its_position_alone():
    key = streams.stream_key(0, "augment", 1)
    few = streams.example_keys(key, np.int32([7, 3]))
    many = streams.example_keys(key, np.arange(10, dtype=np.int32))
    np.testing.assert_array_equal(jax.random.key_data(few), jax.random.key_data(many)[np.array([7, 3])])
