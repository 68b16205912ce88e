"""Compile a configuration's training, a speedrun's too, for a GPU that is not there; count a step's kernels.

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION  # as jax; 142 MB
    python -m jaxcifar.gpu_program --config=configs/resnet5m.py --config.dtype=bfloat16

The GPU is an NVIDIA H200; neither one nor a driver, CUDA, cuDNN or data are needed (without a GPU,
install the plugin in a virtual environment of its own: with it, training takes itself to be on a
GPU). Bytes are those of a kernel's arguments and results: each counts whole, even a data set of
which one batch is read. Of a frozen backbone, features are not kept here: the step is the whole
network's. How long a kernel takes, and by which algorithm, only a GPU can say
(`jaxcifar.main --profile`).
"""

import collections
import dataclasses
import functools
import math
import os
import re

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from jaxcifar import command, epoch, logs, run_folder, trace, train
from jaxcifar import main as main_lib
from jaxcifar.data import specs
from jaxcifar.errors import UserError
from jaxcifar.speedrun import proxy, training
from jaxcifar.state import create_state
from jaxcifar.task import create_task

_OUT = flags.DEFINE_string("out", "", "File for the optimised HLO; none is written without.")
_SHOWN = 10
_FIXED = {"deterministic": False, "cuda_graphs": "default"}  # fields of flags that are not set here
# XLA measures no kernels, so that what it chooses is the same every time.
_REPEATABLE = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# XLA's GpuTargetConfigProto, of NVIDIA's figures
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 151000000000 cuda_compute_capability { major: 9 }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H200" dnn_version_info { major: 9 minor: 12 }
"""
_BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # s8 is left out: the working memory of cuBLAS
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_RESULT = re.compile(r"(\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)")  # shape, kind, arguments, the rest
_LOOP_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_NO_KERNEL = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the GPU is given to do at once: HLO name, its place in the program, bytes moved."""

    name: str
    op_name: str
    num_bytes: int
    is_convolution: bool

    @property
    def part(self):
        """The part of a training step that it belongs to."""
        for name in ("augment", "optimizer"):
            if name in self.op_name.split("/"):
                return name
        return trace.phase(self.op_name)


def configure():
    """Set up JAX, before it starts, to compile without a GPU."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_REPEATABLE}".strip()


def compiled(config):
    """Compile a call of an epoch's full batches for one H200, or a whole speedrun.

    Returns:
      jax.stages.Compiled. Raises UserError where JAX's CUDA plugin is missing.
    """
    try:
        device = topologies.get_topology_desc(
            platform="cuda", target_config=_H200, topology="1x1x1").devices[0]
    except NotImplementedError as error:
        raise UserError("JAX's CUDA plugin is not installed: see the head of "
                        f"{os.path.relpath(__file__)}") from error
    function, arguments, donated = (_speedrun if config.speedrun.epochs else _epoch)(config)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    cpu, jax.default_backend = jax.default_backend, lambda: "gpu"  # by which our forms are chosen
    try:
        return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    finally:
        jax.default_backend = cpu


def _epoch(config):
    """Return (function, arguments, positions of the donated ones) of an epoch's full batches."""
    data, classes = _data(config)
    num_train = len(data["labels"])
    task = create_task(config, num_train, classes)
    steps = functools.partial(epoch.train_steps, task, max(task.full_steps, 1), config.batch_size,
                              False, axis_name=None, num_devices=1)
    state = create_state(task, config.seed).on_device()
    return steps, (state, data, np.empty(num_train, np.int32)), (0,)


def _speedrun(config):
    """Return the same of all steps of a speedrun."""
    data, classes = _data(config)
    run = training.create(config, len(data["labels"]), classes)
    steps = functools.partial(training.all_steps, run, select=proxy.select)
    return steps, (np.uint32(0), data["images"], data["labels"]), ()


def _data(config):
    spec = specs.get_spec(config.dataset)
    count = spec.count("train") - config.val_size
    if count < 1:
        raise UserError(f"config.val_size = {config.val_size} leaves none of the {spec.count('train'):,} "
                        "training images")
    return {"images": np.empty((count, *specs.IMAGE_SHAPE), np.uint8),
            "labels": np.empty(count, np.int32)}, spec.num_classes


def kernels(text):
    """Return the Kernels of one step: of the longest loop body of optimised HLO, or of all of it."""
    places, bodies, lists = trace.instructions(text)[0], set(), collections.defaultdict(list)
    for computation, name, result in trace.parsed(text):
        lists[computation].append((name, *_RESULT.match(result).groups()))
        bodies |= set(_LOOP_BODY.findall(result))
    step = max((lists[body] for body in bodies), key=len, default=lists[computation])
    sizes = {name: _num_bytes(shape) for name, shape, *_ in step}
    return [Kernel(name, places[name],
                   sizes[name] + sum(sizes.get(a, 0) for a in re.findall(r"%?([\w.\-]+)", given)),
                   "__cudnn$conv" in rest)
            for name, _, kind, given, rest in step if kind not in _NO_KERNEL]


def _num_bytes(shape):
    return sum(_BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n)
               for kind, sizes in _ARRAY.findall(shape))


def table(step):
    """Return lines: kernels and megabytes of each part of a step, and the kernels that move most."""
    rows = collections.defaultdict(list)
    for kernel in step:
        rows[kernel.part].append(kernel)
    lines = [f"{'part':12} {'kernels':>8} {'convolutions':>13} {'MB':>8}"]
    for part, members in [*sorted(rows.items()), ("all", step)]:
        lines.append(f"{part:12} {len(members):8} {sum(k.is_convolution for k in members):13} "
                     f"{sum(k.num_bytes for k in members) / 1e6:8.1f}")
    most = sorted(step, key=lambda kernel: -kernel.num_bytes)[:_SHOWN]
    return lines + ["", f"{'MB':>8}  kernel"] + [
        f"{k.num_bytes / 1e6:8.1f}  {k.name[:36]:36}  {trace.place(k.op_name)}" for k in most]


def main(argv):
    """Compile what the flags say and print the table; return the exit code."""
    del argv
    config = flags.FLAGS.config
    return command.run(lambda: _print(config), traceback=flags.FLAGS.traceback)


def _print(config):
    main_lib.refuse_flags_of_a_run("here, where nothing is trained")
    for field, usual in _FIXED.items():
        if config[field] != usual:
            raise UserError(f"config.{field} = {config[field]!r} changes nothing here: leave it at "
                            f"{usual!r}")
    if _OUT.value:
        run_folder.check_target(_OUT.value)
    (training.check if config.speedrun.epochs else train.check)(config)
    configure()
    jax.config.update("jax_default_matmul_precision",
                      None if config.precision == "default" else config.precision)
    watch = logs.Stopwatch()
    program = compiled(config)
    text, memory = program.as_text(), program.memory_analysis()
    print(f"a training step of {config.model.name}, {config.batch_size} images, {config.dtype}, as "
          f"JAX {jax.__version__} compiles it for an NVIDIA H200 (in {watch.seconds():.0f} s)\n")
    print("\n".join(table(kernels(text))))
    print(f"\nmemory: {memory.argument_size_in_bytes / 1e6:.0f} MB of data and state, "
          f"{memory.temp_size_in_bytes / 1e6:.0f} MB of temporaries")
    if _OUT.value:
        run_folder.write_atomic(_OUT.value, text)


if __name__ == "__main__":
    app.run(main, flags_parser=main_lib.parse)
