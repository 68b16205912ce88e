"""jaxcifar as shipped: the compiled programs of train.fit, called as train.fit calls them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcifar import config as config_lib
from jaxcifar import environment, epoch, models, parallel, saved, train
from jaxcifar.benchmark import inputs
from jaxcifar.models import counts
from jaxcifar.programs import Programs, runs_on_cpu, steps_per_call
from jaxcifar.task import create_task


class Contender:
    """A prepared run; kinds: name -> function (batches, start) -> images (see child.measure)."""

    def __init__(self, work, config):
        """Put data and state on the device; nothing is compiled yet."""
        self._work, self._config = work, config
        self.devices = parallel.create(config)
        arrays = inputs.generated(work["num_train"])
        self._task = create_task(config, work["num_train"], inputs.NUM_CLASSES)
        self._programs = Programs(self._task, self.devices)
        self._on_cpu = runs_on_cpu(self.devices)
        self._data = self.devices.replicate(arrays)
        state = saved.template(self._task).on_device()
        self._live = self.devices.replicate(state)
        self._host_step, self._permutation = 0, None
        self.repeat_warm_up = False  # every call is the same program
        kinds = {"step": self._train, "epoch": self._train, "eval": self._evaluate,
                 "augment": self._augment}
        self.kinds = {kind: kinds[kind] for kind in work["kinds"]} | {"peak": self._peak()}
        self._augment_program = self.devices.program(functools.partial(
            augment_steps, self._task, self._steps_per_augment(), config.batch_size))

    def idle(self):
        """Stop all work between two measurements: nothing goes on here."""

    def _train(self, batches, start):
        """Take steps as train.train_epoch does: an order per epoch, a look at the sums per call."""
        start()
        images = 0
        while images < batches * self._config.batch_size:
            at = self._host_step % self._task.steps_per_epoch
            if at == 0 or self._permutation is None:
                self._live = self._live.replace(epoch=self.devices.replicate(
                    np.int32(self._host_step // self._task.steps_per_epoch)))
                self._permutation = self._programs.permutation(self._live)
            steps, size = self._programs.steps_at(at)
            self._live = self._programs.train(self._live, self._data, self._permutation, at)
            int(self.devices.fetch(self._live.sums["bad_step"]))  # waits for the device
            self._host_step += steps
            images += steps * size
        return images

    def _evaluate(self, batches, start):
        wanted, whole = batches * self._config.eval_batch_size, min(self._task.num_train, 10_000)
        # Elsewhere than on CPU one program evaluates all images.
        count, passes = (min(wanted, whole), 1) if self._on_cpu else (whole, -(-wanted // whole))
        start()
        for _ in range(passes):
            self._programs.evaluate(self._live, self._data, (0, count))
        return passes * count

    def _augment(self, batches, start):
        permutation = self._programs.permutation(self._live)
        jax.block_until_ready(permutation)
        per_call = self._steps_per_augment()
        calls = -(-batches // per_call)
        start()
        for _ in range(calls):
            jax.block_until_ready(self._augment_program(self._live, self._data, permutation))
        return calls * per_call * self._config.batch_size

    def _steps_per_augment(self):
        return steps_per_call(self._task, self._on_cpu)

    def _peak(self):
        """Return the work "peak": large matrix products; its "images" are their operations."""
        size, count = inputs.PRODUCTS[self._on_cpu]
        product = jax.jit(lambda a, b: a @ b)

        def run(batches, start):
            del batches
            factor = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
            factor = factor.astype(self._config.dtype)
            result = jax.block_until_ready(product(factor, factor))
            start()
            for _ in range(count):
                result = product(factor, result)
            jax.block_until_ready(result)
            return count * 2 * size**3
        return run

    def memory(self):
        """Return the peak memory so far, in bytes: of the device and of the host."""
        return environment.memory()

    def report(self):
        """Return what the table says of this process, see table.rows."""
        sums = self.devices.fetch(self._live.sums)
        return {"environment": environment.environment(),
                "dtype": self._config.dtype, "variant": f"{self.devices.kind} {self._config.dtype}",
                **multiply_adds(self._work["model"]),
                "loss": float(sums["loss_sum"]) / max(int(sums["count"]), 1)}


def multiply_adds(name):
    """Return a model's multiply-adds of one image: {"multiply_adds": forward, "training": a step}.

    A training step is the forward pass and as much again for the gradients of the parameters and
    for those of the layers' inputs, without the first layer's: images need no gradient.
    """
    model = models.create(name)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        models.shapes(model), image).jaxpr
    layer = next(equation for equation in counts.equations(jaxpr)
                 if equation.primitive.name in ("conv_general_dilated", "dot_general"))
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in layer.invars]
    first = counts.multiply_adds(lambda *x: layer.primitive.bind(*x, **layer.params), *shapes)
    forward = counts.count(model)["multiply_adds"]
    return {"multiply_adds": forward, "training": 3 * forward - first}


def augment_steps(task, num_steps, size, state, data, permutation, *, axis_name, num_devices):
    """Gather and augment `num_steps` batches; return the images of one, of more the sum of all pixels."""
    def images(step):
        at = state.replace(step=state.epoch * task.steps_per_epoch + step)
        return epoch.train_batch(task, size, at, data, permutation, axis_name, num_devices).images

    if num_steps == 1:
        return images(0)  # XLA:CPU takes longer for their sum than for all the rest
    return lax.scan(lambda total, step: (total + images(step).astype(jnp.float32).sum(), None),
                    jnp.float32(0), jnp.arange(num_steps))[0]


def prepare(work):
    """Return the Contender of a work (a dict, see work.Work and driver)."""
    config = config_lib.default()
    config.model = config_lib.model(work["model"])
    config.augment, config.batch_size = work["augment"], work["batch"]
    config.drop_last, config.val_size = True, 0
    config.num_devices = 1
    config.dtype = "bfloat16" if work["contender"].endswith("bf16") else "float32"
    config.optimizer.name = work["optimizer"]
    if work["optimizer"] == "sgd":
        config.optimizer.learning_rate = 0.01
        config.optimizer.momentum, config.optimizer.weight_decay = 0.9, 5e-4
    else:
        config.optimizer.learning_rate = 1e-3
    config.compilation_cache = "auto" if work["caches"] else ""
    train.configure_jax(config)
    config.eval_batch_size = min(work["eval_batch"], work["num_train"])
    return Contender(work, config)
