"""A speedrun in PyTorch, to be measured beside ours: the child process of `rival.measure`.

    python -m jaxcifar.speedrun.torch_rival SPECIFICATION.json

The algorithms published as airbench94_muon, airbench94 and airbench96 (arXiv 2404.00498, Muon's
write-up), written anew: float16 network, its first layer too, in channels_last with float32
BatchNorm, torch.compile, data on the device, an epoch's images cropped and mirrored at once. Timed
as published, by CUDA events: whitening, training, the evaluation of six views. Apart: drawing the
weights, and the warm-up run, which compiles. Where there is no CUDA (tests) it runs in float32.

Lines out, JSON: {"ready": ...}, then a row for each run; or {"error": message}.
"""

import json
import os
import pathlib
import sys

import numpy as np

from jaxcifar.benchmark.child import end_with_parent
from jaxcifar.errors import UserError
from jaxcifar.logs import Stopwatch
from jaxcifar.speedrun import torch_network

# What `auto` tries on CUDA, in this order: the published scripts' mode first.
COMPILE_MODES = ("max-autotune", "default", "off")
_VIEWS = ((1, 0.25), (0, 0.125), (2, 0.125))  # corner of the window in the padded image, weight


class Rival:
    """Network, optimisers and data on the device.

    spec: see `rival.specification`. arrays: "train_images", "train_labels", "test_images",
    "test_labels", as data.Dataset has them.
    """

    def __init__(self, spec, arrays, *, compile_mode="off"):
        """Put everything on the device; compiles at the first use. Raises UserError."""
        import torch
        self._torch, self.spec = torch, spec
        self.cuda = spec["platform"] != "cpu"
        if self.cuda and not torch.cuda.is_available():
            raise UserError(f"PyTorch {torch.__version__} sees no CUDA device, where JAX uses one")
        torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.model = torch_network.create(**spec["model"]).to(
            self.device, self.dtype, memory_format=torch.channels_last)
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2].startswith("norm"):
                module.float()
        self.model.whiten.weight.requires_grad = False
        self._data = {split: self._on_device(arrays[f"{split}_images"], arrays[f"{split}_labels"])
                      for split in ("train", "test")}
        self._forward, self._orthogonal = self.model, orthogonalized
        if compile_mode != "off":
            self._forward = torch.compile(self.model, mode=compile_mode, dynamic=False)
            self._orthogonal = torch.compile(orthogonalized, dynamic=False)

    def run(self, seed):
        """Train and evaluate a network; return its row, as driver's."""
        self.reset(seed)
        _, seconds = self._timed(self._whiten_and_train)
        tta, evaluation = self._timed(lambda: self._accuracy(views=True))
        return {"seed": seed, "accuracy": self._accuracy(views=False), "accuracy_tta": tta,
                "seconds": seconds, "seconds_with_evaluation": seconds + evaluation}

    def reset(self, seed):
        """Draw the weights, and forget what the optimisers remember."""
        torch, options = self._torch, self.spec["optimizer"]
        torch.manual_seed(seed)
        self.model.reset()
        groups, self._filters = {}, []
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            rule = self.spec["parameters"][name]
            if rule["muon"]:
                self._filters.append((p, torch.zeros_like(p), rule["factor"]))
            else:
                key = (name == "whiten.bias", rule["factor"], rule["decays"])
                groups.setdefault(key, []).append(p)
        self._groups = [(is_bias, factor) for is_bias, factor, _ in groups]
        self._sgd = torch.optim.SGD(
            [{"params": members, "lr": 0.0,
              "weight_decay": options["weight_decay"] / factor if decays else 0.0}
             for (_, factor, decays), members in groups.items()],
            lr=0.0, momentum=options["momentum"], nesterov=options["nesterov"],
            **({"fused": True} if self.cuda else {}))
        self._slow = None

    def whiten(self):
        """Set the first layer from the training images' patches (arXiv 2404.00498, 3.2)."""
        torch, options = self._torch, self.spec["speedrun"]
        seen = self._normalized("train")[:options["whiten_images"]].permute(0, 3, 1, 2)
        patches = seen.unfold(2, 2, 1).unfold(3, 2, 1).float()  # [n, 3, 31, 31, 2, 2]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + options["whiten_eps"])).T.reshape(12, 3, 2, 2)
        self.model.whiten.weight.data[:] = torch.cat([filters, -filters])

    def step(self, images, labels, number):
        """Take step `number` on images [n, 3, 32, 32], normalised, and labels int64 [n]."""
        torch, spec = self._torch, self.spec
        train_bias = number < len(spec["bias_shares"])
        loss = torch.nn.functional.cross_entropy(
            self._forward(images, train_bias), labels, reduction="sum",
            label_smoothing=spec["label_smoothing"])
        loss.backward()
        rate = spec["rates"][number]
        for group, (is_bias, factor) in zip(self._sgd.param_groups, self._groups, strict=True):
            share = spec["bias_shares"][number] if is_bias and train_bias else 1.0
            group["lr"] = rate * factor * share
        self._sgd.step()
        with torch.no_grad():
            for p, buffer, factor in self._filters:
                self._muon(p, buffer, rate * factor)
            if spec["speedrun"]["lookahead_every"]:
                self._look_ahead(number + 1)
        self.model.zero_grad(set_to_none=True)

    def finish(self):
        """Take the slow weights after the last step, under lookahead."""
        if self._slow is not None:
            for slow, fast in zip(self._slow, self._floats(), strict=True):
                fast.copy_(slow)

    def _muon(self, p, buffer, rate):
        options = self.spec["optimizer"]
        buffer.mul_(options["muon_momentum"]).add_(p.grad)
        ahead = p.grad.add(buffer, alpha=options["muon_momentum"])
        if self.spec["speedrun"]["unit_filters"]:
            p.mul_(len(p)**0.5 / p.norm())
        matrix = ahead.reshape(len(p), -1).to(
            self._torch.bfloat16 if self.cuda else self._torch.float32)
        update = self._orthogonal(matrix, options["muon_steps"], tuple(options["coefficients"]))
        factor = max(1, matrix.shape[0] / matrix.shape[1])**0.5
        p.sub_(update.reshape(p.shape).to(p.dtype), alpha=rate * factor)

    def _look_ahead(self, taken):
        options, total = self.spec["speedrun"], len(self.spec["rates"])
        if taken % options["lookahead_every"]:
            return
        decay = options["lookahead_decay"]**options["lookahead_every"] * (taken / total)**3
        for slow, fast in zip(self._slow, self._floats(), strict=True):
            slow.lerp_(fast, 1 - decay)
            fast.copy_(slow)

    def start_lookahead(self):
        """Remember the weights before the first step, where lookahead is on."""
        if self.spec["speedrun"]["lookahead_every"]:
            self._slow = [tensor.clone() for tensor in self._floats()]

    def _floats(self):
        """Return the weights and running statistics, in place."""
        state = self.model.state_dict().values()
        return [tensor for tensor in state if tensor.is_floating_point()]

    def _whiten_and_train(self):
        torch, spec = self._torch, self.spec
        options, size = spec["speedrun"], spec["batch_size"]
        self.whiten()
        self.start_lookahead()
        self.model.train()
        images, labels = self._normalized("train"), self._data["train"][1]
        first = torch.rand(len(images), device=self.device) < 0.5
        images = torch.where(first.view(-1, 1, 1, 1), images.flip(2), images)
        padded = padded_images(images, options["translate"])
        per_epoch = len(labels) // size
        for number in range(len(spec["rates"])):
            epoch, place = divmod(number, per_epoch)
            if place == 0:
                seen = self._augmented(padded, epoch)
                order = torch.randperm(len(labels), device=self.device)
            index = order[place * size:(place + 1) * size]
            self.step(seen[index].permute(0, 3, 1, 2), labels[index], number)
        self.finish()

    def _augmented(self, padded, epoch):
        """Return an epoch's images [N, 32, 32, 3]: cropped, in odd epochs mirrored, squares cut."""
        torch, options = self._torch, self.spec["speedrun"]
        count = len(padded)
        corner = torch.randint(0, 2 * options["translate"] + 1, (2, count), device=self.device)
        images = windows(padded, corner)
        images = images.flip(2) if epoch % 2 else images
        if options["cutout"]:
            side, place = options["cutout"], torch.arange(32, device=self.device)
            top, left = torch.randint(0, 33 - side, (2, count, 1), device=self.device)
            rows, columns = ((place >= at) & (place < at + side) for at in (top, left))
            square = rows[:, :, None] & columns[:, None, :]
            images = images.masked_fill(square[..., None], 0)
        return images

    def _accuracy(self, *, views):
        """Return the test images' accuracy in percent, of all six views or of the image alone."""
        self.model.eval()
        images, labels = self._normalized("test"), self._data["test"][1]
        size, right = self.spec["eval_batch_size"], 0
        with self._torch.no_grad():
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                logits = self._view_logits(x) if views else self._logits(x)
                right = right + (logits.argmax(1) == y).sum()
        return 100 * float(right) / len(labels)

    def _view_logits(self, images):
        padded, total = padded_images(images, 1), 0
        for at, weight in _VIEWS:
            view = padded[:, at:at + 32, at:at + 32]
            for seen in (view, view.flip(2)):
                total = total + weight * self._logits(seen)
        return total

    def _logits(self, images):
        return self._forward(images.contiguous().permute(0, 3, 1, 2))

    def _normalized(self, split):
        mean, std = (self._torch.tensor(self.spec[key], dtype=self.dtype, device=self.device)
                     for key in ("mean", "std"))
        return (self._data[split][0] - mean) / std

    def _on_device(self, images, labels):
        """Return images [N, 32, 32, 3] in [0, 1] and labels int64 [N]."""
        torch = self._torch
        pixels = torch.from_numpy(np.array(images)).to(self.device).to(self.dtype)
        return pixels / 255, torch.from_numpy(np.array(labels)).long().to(self.device)

    def _timed(self, function):
        """Return (what function() returns, its seconds)."""
        torch = self._torch
        if not self.cuda:
            watch = Stopwatch()
            return function(), watch.seconds()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return result, begin.elapsed_time(end) / 1e3


def orthogonalized(matrix, steps, coefficients):
    """Return Newton and Schulz's iteration of a matrix, as jaxcifar.muon.orthogonalize."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


def padded_images(images, width):
    """Return images [N, H, W, C] with reflected borders of `width` pixels."""
    import torch
    sides = []
    for length in images.shape[1:3]:
        place = torch.arange(-width, length + width, device=images.device).abs()
        sides.append(torch.where(place < length, place, 2 * (length - 1) - place))
    return images[:, sides[0]][:, :, sides[1]]


def windows(padded, corner, size=32):
    """Return of every image [N, H, W, C] the window at corner int64 [2, N]: [N, size, size, C]."""
    import torch
    place = torch.arange(size, device=padded.device)
    rows, columns = (corner[:, :, None] + place)
    number = torch.arange(len(padded), device=padded.device)
    return padded[number[:, None, None], rows[:, :, None], columns[:, None, :]]


def prepare(spec, arrays):
    """Return (Rival, what was done apart from the runs): compiled and warmed up by a whole run.

    With spec["compile"] "auto", a mode that fails gives way to the next of spec["modes"]
    (COMPILE_MODES where it is absent); "failed" then says which and why. Raises the last mode's
    exception.
    """
    asked = spec["compile"]
    auto = spec.get("modes", COMPILE_MODES) if spec["platform"] != "cpu" else ("off",)
    failed = []
    for mode in auto if asked == "auto" else (asked,):
        watch = Stopwatch()
        try:
            rival = Rival(spec, arrays, compile_mode=mode)
            if rival.cuda or mode != "off":
                rival.run(spec["runs"])
        except UserError:
            raise
        except Exception as error:  # torch.compile fails in many ways: no compiler, a Triton error
            if mode in (asked, "off"):
                raise
            failed.append(f"{mode}: {type(error).__name__}: {str(error).strip()[:300]}")
            print(failed[-1], file=sys.stderr)
        else:
            return rival, {"compile": mode, "failed": failed, "warm_up_seconds": watch.seconds()}
    raise AssertionError("unreachable")


def environment(rival):
    """Return a dict fit for JSON: versions and the device."""
    import torch
    return {"torch": torch.__version__, "cuda": torch.version.cuda if rival.cuda else None,
            "cudnn": torch.backends.cudnn.version() if rival.cuda else None,
            "device": torch.cuda.get_device_name() if rival.cuda else "cpu",
            "dtype": str(rival.dtype).removeprefix("torch.")}


def main():
    """Run what the file named by the first argument specifies."""
    end_with_parent()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print

    def send(message):
        out.write(json.dumps(message) + "\n")

    spec = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        with np.load(spec["arrays"]) as arrays:
            rival, apart = prepare(spec, dict(arrays))
        send({"ready": apart, "environment": environment(rival)})
        for seed in range(spec["runs"]):
            send(rival.run(seed))
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}" if not isinstance(error, UserError)
              else str(error)})
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
