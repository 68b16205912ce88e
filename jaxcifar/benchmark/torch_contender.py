"""torch_eager: PyTorch as pytorch-cifar's users run it, and what it shares with torch_best.

float32, NCHW, a DataLoader with two workers and Pillow transforms, loss and accuracy read after
each step: pytorch-cifar's loop. Its work "step" is that loop on a batch that is already on the
device; the DataLoader enters the works "epoch", "augment" and "eval".
"""

import itertools
import resource
import sys

from jaxcifar.benchmark import inputs, torch_augment, torch_data, torch_twins
from jaxcifar.errors import UserError


def optimizer(work, model, fused):
    """Return the work's torch optimiser of a model."""
    import torch
    options = {"fused": True} if fused else {}
    if work["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3, **options)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, **options)


class Common:
    """What both contenders have: device, data, network, optimiser, the report."""

    def __init__(self, work):
        model = torch_twins.build(work["model"], inputs.NUM_CLASSES)
        import torch
        self._torch, self._work = torch, work
        if not work["on_cpu"] and not torch.cuda.is_available():
            raise UserError(f"PyTorch {torch.__version__} sees no CUDA device, where JAX uses one")
        self.device = torch.device("cpu" if work["on_cpu"] else "cuda")
        if work["threads"]:
            torch.set_num_threads(work["threads"])
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self._arrays = inputs.generated(work["num_train"])
        self._images, self._labels = torch_data.device_data(self._arrays, self.device)
        self._model = model.to(self.device)
        self._loss, self._dtype, self.variant = None, "float32", ""
        self._count = min(10_000, work["num_train"])  # images that evaluation passes at most
        self._eval_batch = min(work["eval_batch"], self._count)
        self._compile_seconds = {}  # {kind of work: what was compiled before its first call}
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


class Eager(Common):
    """pytorch-cifar's loop."""

    def __init__(self, work):
        """Prepare network and data."""
        super().__init__(work)
        torch = self._torch
        self._optimizer = optimizer(work, self._model, fused=False)
        self._criterion = torch.nn.CrossEntropyLoss()
        exact = self.device.type == "cuda" and not torch.backends.cuda.matmul.allow_tf32
        self.variant = (f"eager float32{' (TF32 in convolutions only)' * exact} NCHW, "
                        f"{torch_data.source()} in DataLoader")
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
        size = self._work["batch"] if train else self._eval_batch
        arrays = self._arrays if train else {k: v[:self._count] for k, v in self._arrays.items()}
        full = batches >= len(arrays["labels"]) // size
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
        if self.device.type == "cuda":
            batches = self._count  # all of them, as the others
        images = correct = 0
        with self._torch.no_grad():
            for x, labels in self._batches(batches, start, train=False):
                logits = self._model(x.to(self.device))
                correct += logits.max(1)[1].eq(labels.to(self.device)).sum().item()
                images += len(labels)
        return images


def prepare(work):
    """Return the contender torch_eager of a work (a dict, see work.Work and driver)."""
    return Eager(work)
