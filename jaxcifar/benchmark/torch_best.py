"""torch_best: PyTorch with all that it offers.

uint8 data and augmentation on the device, fused optimiser, no look at the loss, and of memory
format, dtype (float32 or AMP bfloat16) and torch.compile what proves fastest here, within
work["choose_seconds"] (0: no limit). The row's `variant` says how far the search went.
"""

import contextlib
import itertools
import sys

from jaxcifar.benchmark import choice, torch_augment, torch_contender
from jaxcifar.benchmark.child import measure
from jaxcifar.logs import Stopwatch

_PROBE_BATCH = 16  # images of the trials that choose memory format and dtype on CPU
_PROBE_STEPS = {"cpu": 1, "cuda": 10}  # on CUDA the host runs ahead of the device
_CHUNK = {"cpu": 1, "cuda": 50}  # batches that are augmented at once


class Best(torch_contender.Common):
    """The fastest form of the network, with its input."""

    def __init__(self, work):
        """Prepare network and data, and choose among the ways to run them."""
        self._choice = choice.Choice(work["choose_seconds"])
        super().__init__(work)
        torch, self._cuda = self._torch, self.device.type == "cuda"
        torch.set_float32_matmul_precision("high")
        self.repeat_warm_up = self._cuda  # chunks of another size compile anew
        self._augment = torch_augment.build(work["augment"], self.device)
        self._normalize = torch_augment.normalizer(self.device)
        self._layout, self._networks = None, {None: self._model}
        self._network_seconds = {}  # of compilation, by form
        self._choose_form()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()  # not that of the ways that were tried
        self.kinds = self._choose({"step": self._train, "epoch": self._train,
                                   "eval": self._evaluate, "augment": self._augment_only})

    def _choose_form(self):
        """Try forms of the network; compile the augmentation after the most promising of them.

        On CPU memory format and dtype are chosen with small batches, and compiled then.
        """
        compiles, augment = self._work["compile"], ""
        self._size = self._work["batch"] if self._cuda else min(_PROBE_BATCH, self._work["batch"])
        if self._cuda and compiles:
            self._choice.run(choice.COMPILED[:1], self._trial)
            augment = self._compile_augmentation()
        self._choice.run(choice.forms(self._choice, self._cuda and compiles), self._trial)
        best = self._choice.best()
        if compiles and not self._cuda:
            self._size = self._work["batch"]
            self._choice.forget_times()
            self._choice.run((best, best._replace(mode="default")), self._trial)
            best = self._choice.best()
        self._set(best)
        seconds = self._network_seconds.get(best, 0.0) + self._compile_seconds.get("augment", 0.0)
        self._compile_seconds |= {"step": seconds, "epoch": seconds}
        self.variant = ", ".join(filter(None, (
            str(best), self._choice.extent(), augment, self._work.get("note") or (
                "" if compiles else "torch.compile not tried"))))

    def _compile_augmentation(self):
        """Compile the augmentation, where there is time; return what the row is to say, or ""."""
        if not self._choice.has_time():
            return "augmentation not compiled for want of time"
        compiled, watch = self._torch.compile(self._augment), Stopwatch()
        try:
            for count in (1, 2, _CHUNK[self.device.type]):  # the second size compiles for any
                compiled(self._images[:count * self._work["batch"]])
            self._sync()
        except Exception as error:  # as in Choice.run
            print(f"torch.compile of the augmentation: {error}", file=sys.stderr)
            return "augmentation not compiled"
        self._augment = compiled
        self._compile_seconds["augment"] = watch.seconds()
        return ""

    def _set(self, form):
        """Run the network in this form from here on."""
        if form.layout != self._layout:
            self._layout = form.layout
            self._model.to(memory_format=self._memory_format())
            # Anew: fused kernels on CUDA refuse a momentum whose strides are not the parameter's.
            self._optimizer = torch_contender.optimizer(self._work, self._model, fused=True)
        if form.mode not in self._networks:
            self._networks[form.mode] = self._torch.compile(
                self._model, mode=form.mode, dynamic=False)
        self._dtype, self._network = form.dtype, self._networks[form.mode]

    def _memory_format(self):
        nhwc = self._layout == "NHWC"
        return self._torch.channels_last if nhwc else self._torch.contiguous_format

    def _trial(self, form):
        """Set a form and return the seconds of its steps; those of its compilation are noted."""
        self._set(form)
        if not form.mode:
            return self._seconds(self._size)
        watch = Stopwatch()
        self._step(self._images[:self._size], self._labels[:self._size])
        self._sync()
        first, seconds = watch.seconds(), self._seconds(self._size)
        self._network_seconds[form] = max(first - seconds / _PROBE_STEPS[self.device.type], 0.0)
        return seconds

    def _seconds(self, size):
        """Return the seconds of steps of `size` images, the best of three times after one more."""
        def steps(batches, start):
            start()
            for _ in range(batches):
                self._step(self._images[:size], self._labels[:size])
            return batches * size
        run, count = self._synced(steps), _PROBE_STEPS[self.device.type]
        return min([measure(run, count)["seconds"] for _ in range(4)][1:])

    def _amp(self):
        if self._dtype == "float32":
            return contextlib.nullcontext()
        return self._torch.autocast(self.device.type, self._torch.bfloat16)

    def _input(self, images):
        return self._normalize(images).contiguous(memory_format=self._memory_format())

    def _step(self, images, labels):
        """Take a step on uint8 images."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._amp():
            logits = self._network(self._input(images))
            loss = self._torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        self._optimizer.step()
        self._loss = loss.detach().clone()

    def _batches(self, batches):
        """Yield (augmented uint8 images, labels), each epoch in a new order, augmented in chunks."""
        torch, size = self._torch, self._work["batch"]
        full = len(self._labels) // size
        chunk = min(_CHUNK[self.device.type], full, batches)
        for begun in range(0, batches, full):
            order = torch.randperm(len(self._labels), device=self.device)
            stop = min(full, batches - begun)
            for first in range(0, stop, chunk):
                index = order[first * size:min(first + chunk, stop) * size]
                images, labels = self._augment(self._images[index]), self._labels[index]
                yield from zip(images.split(size), labels.split(size), strict=True)

    def _train(self, batches, start):
        self._model.train()
        start()
        images = 0
        for x, labels in itertools.islice(self._batches(batches), batches):
            self._step(x, labels)
            images += len(labels)
        return images

    def _augment_only(self, batches, start):
        start()
        total, images = 0, 0
        for x, labels in itertools.islice(self._batches(batches), batches):
            total = total + self._input(x).sum()
            images += len(labels)
        return images

    def _evaluate(self, batches, start):
        self._model.eval()
        size = self._eval_batch
        count = self._count if self._cuda else min(self._count, batches * size)
        count = count // size * size  # whole batches only: another shape would compile again
        passes, correct = -(-batches * size // count) if self._cuda else 1, 0
        start()
        with self._torch.no_grad(), self._amp():
            for _ in range(passes):
                for x, labels in zip(self._images[:count].split(size),
                                     self._labels[:count].split(size), strict=True):
                    correct = correct + self._network(self._input(x)).argmax(1).eq(labels).sum()
        return passes * count


def prepare(work):
    """Return the contender of a work (a dict, see work.Work and driver). Raises UserError."""
    return Best(work)
