"""PyTorch's two contenders: eager as pytorch-cifar's users run it, and at its best.

torch_eager: float32, NCHW, a DataLoader with two workers and Pillow transforms, loss and accuracy
read after each step: pytorch-cifar's loop. Its work "step" is that loop on a batch that is already
on the device; the DataLoader enters the works "epoch" and "augment".

torch_best: uint8 data and augmentation on the device, fused optimiser, no look at the loss, and of
memory format, dtype (float32 or AMP bfloat16) and torch.compile what proves fastest here.
"""

import contextlib
import itertools
import resource
import sys

from jaxcifar.benchmark import inputs, torch_augment, torch_data, torch_twins
from jaxcifar.benchmark.child import measure
from jaxcifar.logs import Stopwatch

_PROBE_BATCH = 16  # images of the trials that choose memory format and dtype on CPU
_PROBE_STEPS = {"cpu": 1, "cuda": 10}  # on CUDA the host runs ahead of the device
_CHUNK = {"cpu": 1, "cuda": 50}  # batches that torch_best augments at once
_EVAL_BATCH = 100  # pytorch-cifar's


def _optimizer(work, model, fused):
    import torch
    options = {"fused": True} if fused else {}
    if work["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3, **options)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, **options)


class _Common:
    """What both contenders have: device, data, network, optimiser, the report."""

    def __init__(self, work):
        model = torch_twins.build(work["model"], inputs.NUM_CLASSES)
        import torch
        self._torch, self._work = torch, work
        cuda = torch.cuda.is_available() and not work["on_cpu"]
        self.device = torch.device("cuda" if cuda else "cpu")
        if work["threads"]:
            torch.set_num_threads(work["threads"])
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self._arrays = inputs.generated(work["num_train"])
        self._images, self._labels = torch_data.device_data(self._arrays, self.device)
        self._model = model.to(self.device)
        self._loss, self._dtype, self.variant = None, "float32", ""
        self._compile_seconds = 0.0
        self._count = min(10_000, work["num_train"])  # images that evaluation passes at most
        self.repeat_warm_up = False

    def idle(self):
        """Stop all work between two measurements."""

    def _sync(self):
        if self.device.type == "cuda":
            self._torch.cuda.synchronize()

    def _synced(self, run):
        """Return `run` with the device waited for before the clock starts and stops."""
        def synced(batches, start):
            def started():
                self._sync()
                start()
            images = run(batches, started)
            self._sync()
            return images
        return synced

    def _choose(self, kinds):
        chosen = {kind: self._synced(kinds[kind]) for kind in self._work["kinds"]}
        return chosen | {"peak": self._synced(self._peak)}

    def _peak(self, batches, start):
        """Multiply large matrices; return the floating-point operations."""
        size, count = inputs.PRODUCTS[self.device.type == "cpu"]
        factor = self._torch.randn(size, size, device=self.device) / size**0.5
        factor = factor.to(getattr(self._torch, self._dtype))
        result = factor @ factor
        start()
        for _ in range(count):
            result = factor @ result
        return count * 2 * size**3

    def memory(self):
        """Return the peak memory so far, in bytes: of the device and of the host."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cuda = self.device.type == "cuda"
        return {"peak_device_bytes": self._torch.cuda.max_memory_allocated() if cuda else None,
                "peak_host_bytes": host * (1 if sys.platform == "darwin" else 1024)}

    def report(self):
        """Return what the table says of this process, see table.rows."""
        torch, cuda = self._torch, self.device.type == "cuda"
        return {
            "environment": {"torch": torch.__version__, "cuda": torch.version.cuda,
                            "device": torch.cuda.get_device_name() if cuda else "cpu",
                            "threads": torch.get_num_threads()},
            "compile_seconds": self._compile_seconds, "dtype": self._dtype, "variant": self.variant,
            "loss": None if self._loss is None else float(self._loss)}


class Eager(_Common):
    """pytorch-cifar's loop."""

    def __init__(self, work):
        """Prepare network and data."""
        super().__init__(work)
        self._optimizer = _optimizer(work, self._model, fused=False)
        self._criterion = self._torch.nn.CrossEntropyLoss()
        self.variant = f"eager float32 NCHW, {torch_data.source()} in DataLoader"
        self.kinds = self._choose({"step": self._steps, "epoch": self._epoch,
                                   "eval": self._evaluate, "augment": self._load})

    def _train(self, batches):
        """Train on each (images, labels); return the number of images."""
        self._model.train()
        images = correct = 0
        for x, labels in batches:
            x, labels = x.to(self.device), labels.to(self.device)
            self._optimizer.zero_grad()
            logits = self._model(x)
            loss = self._criterion(logits, labels)
            loss.backward()
            self._optimizer.step()
            self._loss = loss.item()
            correct += logits.max(1)[1].eq(labels).sum().item()
            images += len(labels)
        return images

    def _steps(self, batches, start):
        size = self._work["batch"]
        x = torch_augment.normalizer(self.device)(self._images[:size]).contiguous()
        start()
        return self._train(itertools.repeat((x, self._labels[:size]), batches))

    def _batches(self, batches, start, train=True):
        """Yield the DataLoader's batches; part of an epoch is timed without its workers' start."""
        size = self._work["batch"] if train else _EVAL_BATCH
        full = batches >= self._work["num_train"] // size
        arrays = self._arrays if train else {k: v[:self._count] for k, v in self._arrays.items()}
        if full:
            start()
        self._loader = iter(torch_data.loader(arrays, self._work["augment"], size, train=train))
        if not full:
            next(self._loader)
            start()
        yield from itertools.islice(self._loader, batches)

    def idle(self):
        """End the DataLoader's workers, which would go on preparing batches."""
        self._loader = None

    def _epoch(self, batches, start):
        return self._train(self._batches(batches, start))

    def _load(self, batches, start):
        return sum(len(labels) for _, labels in self._batches(batches, start))

    def _evaluate(self, batches, start):
        self._model.eval()
        images = correct = 0
        with self._torch.no_grad():
            for x, labels in self._batches(batches, start, train=False):
                logits = self._model(x.to(self.device))
                correct += logits.max(1)[1].eq(labels.to(self.device)).sum().item()
                images += len(labels)
        return images


class Best(_Common):
    """PyTorch with all that it offers."""

    def __init__(self, work):
        """Prepare network and data, and choose among the ways to run them."""
        super().__init__(work)
        torch = self._torch
        torch.set_float32_matmul_precision("high")
        self.repeat_warm_up = self.device.type == "cuda"  # chunks of another size compile anew
        self._augment = torch_augment.build(work["augment"], self.device)
        self._normalize = torch_augment.normalizer(self.device)
        if self.device.type == "cuda" and work["compile"]:
            self._compile_augmentation()
        self._network, self._format = self._model, None
        self._try_formats()
        if work["compile"]:
            self._try_compile()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # not that of the ways that were tried
        self.kinds = self._choose({"step": self._train, "epoch": self._train,
                                   "eval": self._evaluate, "augment": self._augment_only})

    def _compile_augmentation(self):
        compiled = self._torch.compile(self._augment)
        try:
            for count in (1, 2, _CHUNK[self.device.type]):  # the second size compiles for any
                compiled(self._images[:count * self._work["batch"]])
        except Exception as error:  # as in _try_compile
            print(f"torch.compile of the augmentation: {error}", file=sys.stderr)
        else:
            self._augment = compiled

    def _set(self, memory_format, dtype, network=None):
        if memory_format is not self._format:
            self._model.to(memory_format=memory_format)
            # Anew: fused kernels on CUDA refuse a momentum whose strides are not the parameter's.
            self._optimizer = _optimizer(self._work, self._model, fused=True)
        self._format, self._dtype = memory_format, dtype
        self._network = self._model if network is None else network
        layout = "NHWC" if memory_format is self._torch.channels_last else "NCHW"
        self.variant = f"{'eager' if network is None else 'compiled'} {dtype} {layout}"

    def _seconds(self, size):
        """Return the seconds of steps of `size` images, the best of three times after one more."""
        def steps(batches, start):
            start()
            for _ in range(batches):
                self._step(self._images[:size], self._labels[:size])
            return batches * size
        run, count = self._synced(steps), _PROBE_STEPS[self.device.type]
        return min([measure(run, count)["seconds"] for _ in range(4)][1:])

    def _try_formats(self):
        torch, size = self._torch, self._work["batch"]
        size = min(_PROBE_BATCH, size) if self.device.type == "cpu" else size
        trials = {}
        for choice in itertools.product((torch.channels_last, torch.contiguous_format),
                                        ("float32", "bfloat16")):
            self._set(*choice)
            trials[choice] = self._seconds(size)
        self._set(*min(trials, key=trials.get))

    def _try_compile(self):
        """Take torch.compile's network where it is faster.

        On CUDA the better of two modes, and bfloat16 in NHWC beside what is fastest uncompiled: there
        the time to start kernels hides what they take.
        """
        torch, size, chosen = self._torch, self._work["batch"], (self._format, self._dtype)
        modes, forms = ("default",), [chosen]
        if self.device.type == "cuda":
            modes = ("default", "reduce-overhead")
            forms = dict.fromkeys([chosen, (torch.channels_last, "bfloat16")])
        trials, networks = {(chosen, None): self._seconds(size)}, {None: None}
        seconds = {(chosen, None): 0.0}
        for form, mode in itertools.product(forms, modes):
            if mode not in networks:
                networks[mode] = torch.compile(self._model, mode=mode, dynamic=False)
            self._set(*form, networks[mode])
            watch = Stopwatch()
            try:
                self._step(self._images[:size], self._labels[:size])
                self._sync()
                seconds[form, mode] = watch.seconds()
                trials[form, mode] = self._seconds(size)
            except Exception as error:  # no C++ compiler, an operation that cannot be compiled
                print(f"torch.compile ({mode}): {error}", file=sys.stderr)
        best = min(trials, key=trials.get)
        form, mode = best
        self._set(*form, networks[mode])
        self._compile_seconds = seconds[best]
        self.variant += "" if mode in (None, "default") else f" {mode}"

    def _amp(self):
        if self._dtype == "float32":
            return contextlib.nullcontext()
        return self._torch.autocast(self.device.type, self._torch.bfloat16)

    def _input(self, images):
        return self._normalize(images).contiguous(memory_format=self._format)

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
        """Yield (augmented uint8 images, labels) of a new order, augmented in chunks."""
        torch, size = self._torch, self._work["batch"]
        batches = min(batches, len(self._labels) // size)
        chunk = min(_CHUNK[self.device.type], batches)
        order = torch.randperm(len(self._labels), device=self.device)
        for first in range(0, batches, chunk):
            index = order[first * size:(first + chunk) * size]
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
        size = self._work["batch"]
        count = self._count if self.device.type == "cuda" else min(self._count, batches * size)
        count = count // size * size  # whole batches only: another shape would compile again
        correct = 0
        start()
        with self._torch.no_grad(), self._amp():
            for x, labels in zip(self._images[:count].split(size),
                                 self._labels[:count].split(size), strict=True):
                correct = correct + self._network(self._input(x)).argmax(1).eq(labels).sum()
        return count


def prepare(work):
    """Return the contender of a work (a dict, see work.Work and driver). Raises UserError."""
    return {"torch_eager": Eager, "torch_best": Best}[work["contender"]](work)
