"""What is measured: a model at a batch size, and the kinds of work done with it."""

import dataclasses

from jaxcifar import epoch, models
from jaxcifar.errors import UserError, unknown

KINDS = ("step", "epoch", "eval", "augment")
CONTENDERS = ("jaxcifar", "jaxcifar_bf16", "torch_eager", "torch_best")


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, a batch size and the kinds of work that one process per contender measures.

    augment: specification of jaxcifar.augment. num_train: images of an epoch. optimizer: "sgd"
    (momentum 0.9, weight decay 5e-4, as pytorch-cifar) or "adam". epoch_steps: steps from which an
    epoch is extrapolated; 0: whole epochs (where ours is one program, it is whole anyway). seconds:
    that one measurement should take (whole epochs take what they take). compile: whether torch_best
    may use torch.compile. eval_batch: images in a batch of evaluation, for every contender.
    contenders: those that are measured where the user names none.
    """

    model: str
    batch: int
    kinds: tuple
    augment: str = "crop(4)|flip"
    num_train: int = 50_000
    optimizer: str = "sgd"
    epoch_steps: int = 0
    seconds: float = 2.0
    compile: bool = True
    eval_batch: int = epoch.EVAL_BATCH[True]
    contenders: tuple = CONTENDERS

    def name(self, kind):
        """Return "kind:model@batch", as --work takes it."""
        return f"{kind}:{self.model}@{self.batch}"


# The report's recipe of ResNet-5M model 1 (configs/resnet5m.py).
_RECIPES = {"resnet5m": {"augment": "rotation(5)|flip|crop(2)|autoaugment", "num_train": 45_000,
                         "optimizer": "adam"}}
_BATCH = {"resnet5m": 64}
_TRAINING = ("step", "epoch")
_ALL = (
    ("resnet18", 128, (*_TRAINING, "eval", "augment")), ("resnet18", 512, _TRAINING),
    ("resnet5m", 64, (*_TRAINING, "augment")), ("googlenet", 128, _TRAINING),
    ("densenet121", 128, _TRAINING), ("mobilenetv2", 128, _TRAINING), ("cnn3", 128, _TRAINING),
    ("mlp_s", 128, _TRAINING), ("vit", 128, _TRAINING))
# On CPU in a quarter of an hour: smaller batches where a step takes seconds, and torch.compile
# (minutes for a deep network) only where it is soon done.
_QUICK = (
    ("resnet18", 32, (*_TRAINING, "augment")), ("resnet5m", 64, (*_TRAINING, "augment")),
    ("googlenet", 16, ("step",)), ("densenet121", 16, ("step",)), ("mobilenetv2", 32, ("step",)),
    ("cnn3", 128, _TRAINING), ("mlp_s", 128, _TRAINING), ("vit", 128, ("step",)))
# On a GPU what a session of ten minutes is for, the most wanted first: every contender prepares
# for half a minute to two, so the later works have only those whose ratio counts.
_FASTEST = ("jaxcifar_bf16", "torch_best")
_QUICK_GPU = (
    ("resnet18", 128, (*_TRAINING, "eval", "augment")), ("resnet5m", 64, (*_TRAINING, "augment")),
    ("resnet18", 512, ("step",), _FASTEST), ("cnn3", 128, ("step",), _FASTEST),
    ("vit", 128, ("step",), _FASTEST))
# {on CPU: models}
_QUICK_COMPILE = {True: ("cnn3", "mlp_s", "vit"), False: ("resnet18", "resnet5m", "cnn3", "vit")}
_EPOCH_STEPS = {True: (4, 20), False: (100, 0)}  # {on CPU: (quick, else)}; 100: 1 to 2 s of Pillow


def create(model, batch, kinds, **options):
    """Return the Work of a registered model; batch 0: the model's usual one."""
    if model not in models.names():
        raise UserError(unknown("model", model, models.names()))
    return Work(model, batch or _BATCH.get(model, 128), tuple(kinds),
                **_RECIPES.get(model, {}) | options)


def select(text="", *, batch=0, quick=False, on_cpu=False, epoch_steps=None, seconds=0.0):
    """Return the list of Work of a selection (see `parse`), or the standard list for "".

    quick: short measurements, a shorter list (on CPU with smaller batches), and torch.compile for a
    few models only. epoch_steps: of an epoch's measurement, 0: all; None: on CPU 20 (quick: 4),
    elsewhere all (quick: 100). seconds: that one measurement should take, 0: 2 (quick: 1).
    """
    if batch and not text:
        raise UserError(f"--batch={batch} needs --work: the standard list has batch sizes of its own")
    if epoch_steps is None:
        epoch_steps = _EPOCH_STEPS[on_cpu][0 if quick else 1]
    standard = (_QUICK if on_cpu else _QUICK_GPU) if quick else _ALL
    return [create(model, size, kinds, epoch_steps=epoch_steps,
                   seconds=seconds or (1.0 if quick else 2.0),
                   compile=not quick or model in _QUICK_COMPILE[on_cpu],
                   eval_batch=epoch.EVAL_BATCH[on_cpu], contenders=only[0] if only else CONTENDERS)
            for model, size, kinds, *only in (parse(text, batch) if text else standard)]


def parse(text, batch=0):
    """Return [(model, batch, kinds)] of a selection such as "step:mobilenetv2,epoch:resnet18@512".

    A kind holds for the names after it, at first "step"; @ gives a batch size, else `batch`, else
    0, the model's usual one. Work of one model and batch size is joined. Raises UserError.
    """
    chosen, kind = {}, "step"
    for item in text.replace(" ", "").split(","):
        head, colon, rest = item.rpartition(":")
        kind = head if colon else kind
        if kind not in KINDS:
            raise UserError(unknown("kind of work", kind, KINDS))
        model, _, size = rest.partition("@")
        if size and not (size.isdigit() and int(size)):
            raise UserError(f"--work: {item!r} has batch size {size!r}; write model@128, say")
        kinds = chosen.setdefault((model, int(size or batch)), [])
        if kind not in kinds:
            kinds.append(kind)
    return [(model, size, tuple(kinds)) for (model, size), kinds in chosen.items()]
