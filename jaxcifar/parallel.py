"""Devices and processes: the only file that knows how many there are.

A step knows an axis name and nothing else. Every argument and result of a compiled program is
replicated; a device finds its slice of the batch by `lax.axis_index`. That makes the three ways of
running (`jit` on one device, `pmap` or `shard_map` on several) the same program in another wrapper.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcifar.errors import UserError

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run uses its devices: kind ("jit", "pmap", "shard_map") and the global device list."""

    kind: str
    devices: tuple

    @property
    def num_devices(self):
        """Number of devices over all processes."""
        return len(self.devices)

    @property
    def axis_name(self):
        """Name of the data axis inside a program, None on one device."""
        return None if self.kind == "jit" else AXIS

    @property
    def local_devices(self):
        """The devices of this process."""
        return [d for d in self.devices if d.process_index == jax.process_index()]

    def replicate(self, tree):
        """Put a tree of host arrays on every device, in the form that programs take and return."""
        if self.kind == "jit":
            return jax.device_put(tree, self.devices[0])
        if self.kind == "pmap":
            count = len(self.local_devices)
            one = Mesh(np.asarray(self.local_devices), (AXIS,))
            sharding = NamedSharding(one, PartitionSpec(AXIS))

            def put(x):
                x = np.asarray(x)
                return jax.device_put(np.broadcast_to(x, (count, *x.shape)), sharding)

            return jax.tree.map(put, tree)
        sharding = NamedSharding(self._mesh(), PartitionSpec())

        def place(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, tree)

    def fetch(self, tree):
        """Return a replicated tree as numpy arrays on the host, without any device axis."""
        if self.kind == "pmap":
            tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
            return jax.tree.map(lambda x: np.asarray(x)[0], tree)
        if self.kind == "shard_map":
            tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
        return jax.tree.map(np.asarray, tree)

    def program(self, function, donate=(), name="program"):
        """Wrap `function(*replicated) -> replicated` for these devices.

        Args:
          function: takes `axis_name=` and `num_devices=` beside its replicated positional arguments.
          donate: positions of the arguments whose buffers the result may reuse.
          name: what traces and log lines call it, an identifier.
        """
        return Program(self, function, tuple(donate), name)

    def _mesh(self):
        return Mesh(np.asarray(self.devices), (AXIS,))


class Program:
    """A function for the devices of a Parallel, compiled once per set of argument shapes."""

    def __init__(self, parallel, function, donate, name):
        def call(*args):
            return function(*args, axis_name=parallel.axis_name,
                            num_devices=parallel.num_devices)

        call.__name__ = name
        if parallel.kind == "pmap":
            self._jitted = jax.pmap(call, axis_name=AXIS, devices=parallel.devices,
                                    donate_argnums=donate)
        elif parallel.kind == "shard_map":
            spec = PartitionSpec()
            # check_vma=False: gradients are summed by an explicit psum, as under pmap.
            mapped = jax.shard_map(call, mesh=parallel._mesh(), in_specs=spec, out_specs=spec,
                                   check_vma=False)
            self._jitted = jax.jit(mapped, donate_argnums=donate)
        else:
            self._jitted = jax.jit(call, donate_argnums=donate)
        # Across processes, pmap's compiled form takes other shapes than pmap itself, which finds
        # it in its own cache.
        self._through_pmap = parallel.kind == "pmap" and jax.process_count() > 1
        self._compiled = None

    def lower(self, *args):
        """Trace for these arguments; return a function that compiles, in whatever thread.

        That function does nothing where the program is compiled already; a later call of the
        program must have these arguments' shapes.
        """
        if self._compiled is not None:
            return lambda: None
        lowered = self._jitted.lower(*args)

        def compile_lowered():
            self._compiled = lowered.compile()

        return compile_lowered

    def compile(self, *args):
        """Compile for these arguments, unless that was done; a later call must have their shapes."""
        self.lower(*args)()

    def text(self):
        """Return the optimised HLO of the compiled program, one instruction per line."""
        return self._compiled.as_text()

    def __call__(self, *args):
        if self._through_pmap:
            return self._jitted(*args)
        self.compile(*args)
        return self._compiled(*args)


def compile_all(programs):
    """Compile Programs, {program: its arguments}: traced in turn, compiled by XLA at the same time.

    In turn on accelerators, where XLA measures kernels while it compiles: programs beside one another
    would disturb that, and one after the other takes over what the former measured. In turn, and in
    one order, in several processes. Raises what the first one that fails raises.
    """
    at_once = jax.process_count() == 1 and jax.default_backend() == "cpu"
    workers = len(programs) if at_once else 1
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = [pool.submit(program.lower(*args)) for program, args in programs.items()]
    for compiled in waiting:
        compiled.result()


def create(config):
    """Choose the devices and the way to run on them.

    Raises:
      UserError: the devices do not divide a batch size, fewer devices exist than asked for, or an
        NVIDIA GPU is present while JAX would run on the CPU.
    """
    check_gpu_is_used()
    devices = jax.devices()
    wanted = config.num_devices or len(devices)
    if wanted > len(devices):
        raise UserError(f"config.num_devices = {wanted}: this machine has {len(devices)} "
                        f"{devices[0].platform} device(s)")
    devices = tuple(devices[:wanted])
    if jax.process_count() > 1 and wanted != len(jax.devices()):
        raise UserError("config.num_devices must be 0 (all) when several processes run")
    kind = config.parallel
    if kind == "auto":
        kind = "jit" if wanted == 1 else "pmap"
    if kind == "jit" and wanted > 1:
        raise UserError(f"config.parallel = 'jit' uses one device, and there are {wanted}: "
                        "set config.num_devices=1, or config.parallel to auto, pmap or shard_map")
    for field in ("batch_size", "eval_batch_size"):
        if config[field] % wanted:
            below = config[field] // wanted * wanted
            nearest = f"{below} or {below + wanted}" if below else str(wanted)
            raise UserError(f"config.{field} = {config[field]} cannot be divided among {wanted} "
                            f"devices: use {nearest}, or fewer devices (config.num_devices)")
    return Parallel(kind, devices)


def check_gpu_is_used():
    """Refuse to run on the CPU beside an idle NVIDIA GPU, unless JAX_PLATFORMS asks for the CPU.

    Raises:
      UserError: says which package is missing.
    """
    if "cpu" in _asked_platforms() or jax.default_backend() != "cpu" or not _nvidia_gpu_present():
        return
    raise UserError("an NVIDIA GPU is present but JAX runs on the CPU: install "
                    "'jaxcifar[cuda13]' (or [cuda12] for older drivers), or set "
                    "JAX_PLATFORMS=cpu to use the CPU on purpose")


def _asked_platforms():
    return os.environ.get("JAX_PLATFORMS", "") or jax.config.jax_platforms or ""


def _nvidia_gpu_present():
    return any(pathlib.Path("/proc/driver/nvidia/gpus").glob("*"))


def is_primary():
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


def join(coordinator, num_processes, process_id):
    """Join several processes into one run (jax.distributed), with gloo collectives on CPU.

    Args:
      coordinator: "host:port" of process 0. num_processes, process_id: ints.

    Raises:
      UserError: no such address, or no such process.
    """
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: must be the host:port of process 0, such as "
                        "localhost:1234")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: must be from 0 to {num_processes - 1}, as "
                        f"--num_processes is {num_processes}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def agree_on(number):
    """Return the largest `number` (an int) that any process passes; all of them must call this."""
    if jax.process_count() == 1:
        return int(number)
    from jax.experimental import multihost_utils
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def is_same(number):
    """Return whether all processes pass the same `number` (an int32); all of them must call this."""
    return agree_on(number) == -agree_on(-number)


def in_first(act, what):
    """Call `act` in process 0, and return what it returns; None in the other processes.

    what: it is to do, such as "open the run folder", for the others' message. Raises what `act`
    raises, and UserError in the others: they must not wait for process 0 in vain.
    """
    result, error = None, None
    if is_primary():
        try:
            result = act()
        except Exception as caught:
            error = caught
    if agree_on(error is not None):
        raise error or UserError(f"process 0 could not {what}: see what it printed")
    return result


def share(tree):
    """Return process 0's tree of numpy arrays on every process; all pass trees of the same shapes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def send(x):
        x = np.asarray(x)
        # As bytes, since JAX would turn float64 into float32.
        sent = multihost_utils.broadcast_one_to_all(np.frombuffer(x.tobytes(), np.uint8))
        return np.frombuffer(np.asarray(sent).tobytes(), x.dtype).reshape(x.shape)

    return jax.tree.map(send, tree)
