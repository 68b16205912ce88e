"""A speedrun's training and evaluation as programs of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcifar.speedrun import images as images_lib
from jaxcifar.speedrun import proxy, training


class Trainer:
    """The compiled programs of a speedrun.

    run: training.Speedrun. devices: parallel.Parallel, of one device. rolled: the whole training is
    one program, and the whole evaluation another; else the host loops over steps and batches, since
    XLA:CPU runs convolutions in a rolled loop 25-55 times slower. Both give the same result, to
    rounding.
    """

    def __init__(self, run, devices, *, rolled):
        """Prepare the programs; `compile` or the first use compiles them."""
        self.run, self.devices, self.rolled = run, devices, rolled
        self._all_steps = functools.partial(training.all_steps, select=proxy.select)
        self._train = self.program(self._all_steps)
        self._start = self.program(training.start)
        self._steps = [self.program(functools.partial(_step, train_bias=train_bias), donate=(0,))
                       for train_bias in (False, True)]
        self._proxy = [self.program(function) for function in (
            _proxy_start, proxy.look, proxy.step)]
        self._evaluate = self.program(evaluate)
        self._logits = {kind: self.program(functools.partial(logits_of, kind=kind))
                        for kind in ("all views", "plain")}

    def compile(self, train, test):
        """Compile all that a run needs; train, test: (images, labels) on the device."""
        seed = jnp.uint32(0)
        if self.rolled:
            self._train.compile(seed, *train)
            train_all = functools.partial(self._all_steps, self.run)
            self._evaluate.compile(jax.eval_shape(train_all, seed, *train), *test)
            return
        prepared, state = self._start(seed, *train)
        if self.run.proxy is not None:
            begin, *programs = self._proxy
            small = begin(seed, train[0])
            for program in programs:
                program.compile(small, prepared, seed, jnp.int32(0))
        prepared = prepared.replace(kept=training.first_places(self.run))
        for program in self._steps:
            program.compile(state, prepared, seed, jnp.int32(0))
        index = jnp.arange(self.run.config.eval_batch_size)
        for kind, program in self._logits.items():
            if kind != "plain" or self.run.config.speedrun.tta_share < 1:
                program.compile(training.result(state), test[0], index)

    def train(self, seed, train):
        """Train one network on (images, labels); return its variables when they are done."""
        seed = jnp.uint32(seed)
        if self.rolled:
            return jax.block_until_ready(self._train(seed, *train))
        prepared, state = self._start(seed, *train)
        if self.run.proxy is not None:
            prepared = prepared.replace(kept=self._select(prepared, seed, train[0]))
        for number in range(self.run.total_steps):
            program = self._steps[number < self.run.bias_steps]
            state = program(state, prepared, seed, jnp.int32(number))
        return jax.block_until_ready(training.result(state))

    def _select(self, prepared, seed, images):
        """Return what proxy.select returns, by a loop of the host."""
        begin, look, step = self._proxy
        state, every_kept = begin(seed, images), []
        for number in range(self.run.total_steps):
            trained = number % self.run.config.speedrun.proxy_every == 0
            found = (step if trained else look)(state, prepared, seed, jnp.int32(number))
            state, kept = found if trained else (state, found)
            every_kept.append(kept)
        return jnp.stack(every_kept)

    def evaluate(self, variables, test):
        """Return {"accuracy", "accuracy_tta"} in percent on (images, labels), as floats."""
        images, labels = test
        if self.rolled:
            correct = self._evaluate(variables, images, labels)
        else:
            def batched(kind, index):
                return _in_batches(lambda i: self._logits[kind](variables, images, i), index,
                                   self.run.config.eval_batch_size, _one_by_one)

            correct = _correct(self.run, batched, labels)
        correct = self.devices.fetch(correct)
        return {name: float(100 * count / len(labels)) for name, count in correct.items()}

    def program(self, function, donate=()):
        """Return the parallel.Program of function(run, *args); donate: positions among `args`."""
        def call(*args, axis_name, num_devices):
            del axis_name, num_devices  # one device
            return function(self.run, *args)

        return self.devices.program(call, donate)


def _proxy_start(run, seed, images):
    return training.initial(run.proxy, seed, images)


def _step(run, state, prepared, seed, number, *, train_bias):
    return training.step(run, train_bias, state, prepared, seed, number)


def evaluate(run, variables, images, labels):
    """Return the numbers of right answers, int32 [], without and with test-time augmentation."""
    def batched(kind, index):
        return _in_batches(lambda i: logits_of(run, variables, images, i, kind=kind), index,
                           run.config.eval_batch_size, lax.map)

    return _correct(run, batched, labels)


def logits_of(run, variables, images, index, *, kind):
    """Return logits of images[index], float32 [n, 2, classes]: of the image, and of all its views.

    kind: "all views" (their weighted mean), or "plain": the image's own in both places.
    """
    def forward(x):
        return run.task.model.apply(variables, x, train=False)

    seen = run.task.normalize(images[index])
    if kind == "plain":
        logits = forward(seen)
        return jnp.stack([logits, logits], 1)
    parts = [(forward(view), weight) for view, weight in images_lib.views(seen)]
    return jnp.stack([parts[0][0], sum(weight * logits for logits, weight in parts)], 1)


def _correct(run, batched, labels):
    """Count right answers; `batched(kind, index)` gives the logits of the images of an index."""
    everything, share = np.arange(len(labels)), run.config.speedrun.tta_share
    if share == 1:
        logits = batched("all views", everything)
    else:
        logits = batched("plain", everything)
        doubtful = jnp.argsort(_margin(logits[:, 0]))[:round(share * len(labels))]
        if len(doubtful):
            logits = logits.at[doubtful].set(batched("all views", doubtful))
    right = jnp.sum(jnp.argmax(logits, -1) == labels[:, None], 0)
    return {"accuracy": right[0], "accuracy_tta": right[1]}


def _margin(logits):
    """Return by how much the largest probability exceeds the second, float32 [n]."""
    best = lax.top_k(jax.nn.softmax(logits), 2)[0]
    return best[:, 0] - best[:, 1]


def _one_by_one(function, parts):
    return jnp.stack([function(part) for part in parts])


def _in_batches(function, index, size, mapped):
    """Return function(index) in batches of `size`; the last is filled up, and cut again."""
    count = len(index)
    filled = jnp.resize(jnp.asarray(index), (-(-count // size), size))
    parts = mapped(function, filled)
    return parts.reshape(-1, *parts.shape[2:])[:count]
