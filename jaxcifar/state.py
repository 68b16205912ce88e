"""TrainState: everything that a run carries, as one pytree of arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar import selection

NO_STEP = np.iinfo(np.int32).max


@flax.struct.dataclass
class TrainState:
    """All that changes during a run, and all that a checkpoint holds.

    `history` and `plateau` live on the host and change once per epoch; compiled programs get the
    state without them (`on_device`). Everything else lives on the device.
    """

    seed: Any  # uint32 []
    step: Any  # int32 []: batches seen since the start
    epoch: Any  # int32 []: epochs completed
    params: Any
    batch_stats: Any
    opt_state: Any
    hparams: Any  # {"learning_rate", "weight_decay"}: float32 [], traced so that one program serves all
    ema: Any  # {"params", "batch_stats"} or {}
    sums: Any  # metrics of the epoch under way, see `empty_sums`
    history: Any = None  # numpy float64 [epochs, 4], see jaxcifar.selection
    plateau: Any = None  # plateau.Plateau or None

    def on_device(self):
        """Return the state without its host-side part."""
        return self.replace(history=None, plateau=None)

    def with_host(self, host):
        """Return this device state with the host-side part of another state."""
        return self.replace(history=host.history, plateau=host.plateau)

    def variables(self):
        """Return the variables to evaluate: {"params", "batch_stats"}, averaged where EMA is on."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def zero_sums():
    """Return the sums of no example, as `metrics.batch_sums` would give them; numpy arrays."""
    return {"loss_sum": np.zeros((), np.float32), "loss_error": np.zeros((), np.float32),
            "correct": np.zeros((), np.int32), "count": np.zeros((), np.int32)}


def empty_sums():
    """Return `zero_sums` and "bad_step", int32: the first step whose loss is not finite."""
    return {**zero_sums(), "bad_step": np.full((), NO_STEP, np.int32)}


def create_state(task, seed):
    """Initialise a run's state on the default device.

    Args:
      task: a Task. seed: int, of the initialisation and of every stream.
    """
    config = task.config
    learned = _learned(task, seed)
    host = {"seed": np.uint32(seed), "step": np.int32(0), "epoch": np.int32(0),
            "hparams": {"learning_rate": np.float32(config.optimizer.learning_rate),
                        "weight_decay": np.float32(config.optimizer.weight_decay)},
            "sums": empty_sums()}
    return TrainState(**learned, **jax.device_put(host), plateau=task.plateau,
                      history=selection.empty_history(config.epochs))


def _learned(task, seed):
    """Return params, batch_stats, opt_state and ema of a new run, from one compiled program.

    One, since every operation outside of it would be a program of its own to compile.
    """
    def build(seed):
        variables = task.init(seed)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        ema = {"params": params, "batch_stats": batch_stats} if task.config.ema_decay else {}
        return {"params": params, "batch_stats": batch_stats, "opt_state": task.tx.init(params),
                "ema": jax.tree.map(jnp.copy, ema)}

    # Dozens of random tensors compile for longer than they run: on CPU, do not optimise them.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    seed = np.uint32(seed)
    return jax.jit(build).lower(seed).compile(compiler_options=options)(seed)
