"""Devices: what is chosen, what is refused, and that values survive the way there and back."""

import jax
import numpy as np
import pytest
import tiny

from jaxcifar import epoch, parallel
from jaxcifar.errors import UserError


@pytest.mark.parametrize(("fields", "kind", "count"), [
    ({"num_devices": 1}, "jit", 1),
    ({"num_devices": 0}, "pmap", 8),
    ({"num_devices": 2, "parallel": "shard_map"}, "shard_map", 2),
])
def test_the_choice_of_devices(fields, kind, count):
    devices = parallel.create(tiny.tiny_config(**fields))
    assert (devices.kind, devices.num_devices) == (kind, count)


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_devices": 9}, "config.num_devices = 9: this machine has 8 cpu"),
    ({"num_devices": 8, "batch_size": 60}, "cannot be divided among 8 devices: use 56 or 64"),
    ({"num_devices": 8, "eval_batch_size": 4}, "config.eval_batch_size = 4 .* use 8"),
    ({"num_devices": 2, "parallel": "jit"}, "'jit' uses one device, and there are 2"),
])
def test_what_the_devices_refuse(fields, message):
    with pytest.raises(UserError, match=message):
        parallel.create(tiny.tiny_config(**fields))


def test_several_processes_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="num_devices must be 0 .all. when several processes run"):
        parallel.create(tiny.tiny_config(num_devices=2))


@pytest.mark.parametrize(("size", "count", "backend", "expected"), [
    (0, 1, "gpu", 1000), (0, 16, "gpu", 1008), (0, 1, "cpu", 100), (0, 3, "cpu", 102),
    (64, 1, "cpu", 64), (64, 2, "gpu", 64)])
def test_the_examples_of_an_evaluation_batch(size, count, backend, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert epoch.eval_batch_size(tiny.tiny_config(eval_batch_size=size), count) == expected


def test_an_idle_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(parallel, "_nvidia_gpu_present", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    parallel.check_gpu_is_used()  # the CPU was asked for
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(parallel, "_asked_platforms", lambda: "")
    with pytest.raises(UserError, match=r"an NVIDIA GPU is present .* 'jaxcifar\[cuda13\]'"):
        parallel.check_gpu_is_used()


@pytest.mark.parametrize("fields", [
    {"num_devices": 1}, {"num_devices": 4}, {"num_devices": 4, "parallel": "shard_map"}])
def test_there_and_back(fields):
    devices = parallel.create(tiny.tiny_config(**fields))
    tree = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.float32(0.5)}
    back = devices.fetch(devices.replicate(tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert back["a"].dtype == np.uint8 and np.shape(back["b"]) == ()


def test_a_program_knows_its_slice():
    devices = parallel.create(tiny.tiny_config(num_devices=4))

    def total(x, *, axis_name, num_devices):
        return jax.lax.psum(x * jax.lax.axis_index(axis_name), axis_name) / num_devices

    program = devices.program(total)
    assert devices.fetch(program(devices.replicate(np.float32(2)))) == 2 * (0 + 1 + 2 + 3) / 4


@pytest.mark.parametrize(("arguments", "message"), [
    (("localhost:1234", 1, 3), "--process_id=3: must be from 0 to 0, as --num_processes is 1"),
    (("localhost:1234", 2, -1), "--process_id=-1: must be from 0 to 1"),
    (("localhost:1234", 0, 0), "--num_processes=0: must be at least 1"),
    (("localhost", 1, 0), "--coordinator=localhost: must be the host:port"),
])
def test_a_process_that_cannot_join_is_told_why(arguments, message):
    with pytest.raises(UserError, match=message):
        parallel.join(*arguments)


def test_several_processes_agree_alone():
    assert parallel.agree_on(15) == 15 and parallel.is_same(15) and parallel.is_same(0)
    tree = {"x": np.float64(1) / 3}
    assert parallel.share(tree) is tree
