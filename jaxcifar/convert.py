"""Exchange weights with PyTorch: a run's checkpoint to a file of weights, or such a file to a run.

    python -m jaxcifar.convert --from=runs/NAME --to=weights.safetensors
    python -m jaxcifar.convert --from=weights.pth --to=runs/NAME --config=configs/resnet5m.py:model1

Files end in .pt, .pth or .safetensors and hold the state_dict of the PyTorch original; .pth.tar,
.ckpt and .bin are read too. The folder that the second form writes is a run at epoch 0 of that
configuration: jaxcifar.main with the same --config and --workdir trains it on. Weights of other
classes: --fresh='linear' starts the keys that match the regular expression anew.
"""

import pathlib
import re
import sys

import jax
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import command, overrides, run_folder, saved, torch_weights, weight_files
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError


def export_run(workdir, path, *, checkpoint="selected", raw=False):
    """Write a run's weights to a .pt, .pth or .safetensors file.

    workdir: the run's folder. checkpoint: see saved.load_state. raw: see saved.state_dict.

    Returns how long the written weights were trained, a str: see saved.state_dict. Raises UserError:
    no such run, nothing readable in it, or a file that cannot be written.
    """
    weight_files.check_target(path)
    state_dict, description = saved.state_dict(workdir, checkpoint, raw=raw)
    weight_files.save_file(path, state_dict)
    return description


def import_weights(path, workdir, config, *, fresh=""):
    """Write a run folder whose newest checkpoint, of step 0, holds the weights of a file.

    path: see weight_files.load_file. workdir: a folder without a run. config: the run's
    configuration, which names the model. fresh: regular expression; keys of the state_dict in which
    it is found keep the model's own initial values, whatever the file holds for them.

    Raises UserError: the file does not fit the model (the differences are listed), or the folder
    holds a run already.
    """
    config_lib.validate(config)
    workdir = pathlib.Path(workdir)
    run_folder.refuse_other_kind(workdir, "a single run")
    if run_folder.holds_run(workdir):
        raise UserError(f"{workdir} holds a run already: choose another folder for --to")
    task = saved.task_of(config)
    state = saved.template(task)
    name, options = saved.model_of(config)
    given, initial = weight_files.load_file(path), {}
    if fresh:
        given, initial = _parted(given, fresh, torch_weights.to_torch(
            name, {"params": state.params, "batch_stats": state.batch_stats},
            num_classes=task.num_classes, image_size=task.image_size, **options))
    variables = torch_weights.from_torch(
        name, given, initial=initial, num_classes=task.num_classes, image_size=task.image_size,
        **options)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    average = {"params": params, "batch_stats": batch_stats} if config.ema_decay else {}
    state = state.replace(params=params, batch_stats=batch_stats, ema=average,
                          opt_state=jax.tree.map(np.asarray, task.tx.init(params)))
    checkpoints = Checkpoints(workdir)
    run_folder.write_json(workdir / "config.json", config_lib.to_dict(config), sort_keys=True)
    checkpoints.save(state, None)
    checkpoints.close()


def _parted(given, pattern, initial):
    """Return the entries of `given` whose keys do not match, and those of `initial` whose keys do."""
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--fresh={pattern} is not a regular expression: {error}") from error
    anew = {key: value for key, value in initial.items() if matches(key)}
    if not anew:
        raise UserError(f"--fresh={pattern} matches no key of the model; its keys are like "
                        f"{', '.join(list(initial)[-2:])}")
    return {key: value for key, value in given.items() if not matches(key)}, anew


def main(argv):
    """Convert as the command line `argv` says; print one line. Raises UserError."""
    parser = command.Parser(__doc__, "python -m jaxcifar.convert")
    parser.add_argument("--from", dest="source", required=True,
                        help=f"a run folder, or a {', '.join(weight_files.READABLE)} file")
    parser.add_argument("--to", required=True, help=f"a {', '.join(weight_files.SUFFIXES)} file, or "
                                                    "a new run folder")
    parser.add_argument("--checkpoint", default="selected",
                        help=f"which epoch of a run: {', '.join(saved.WHICH)}; default selected")
    parser.add_argument("--raw", action="store_true",
                        help="of a run that averages its weights: not the average")
    parser.add_argument("--fresh", default="", metavar="REGEX",
                        help="of a file: keys that keep the model's initial values")
    parser.add_argument("--config", metavar="FILE[:VARIANT]",
                        help="of the new run; --config.FIELD=VALUE changes a field")
    arguments, rest = parser.parse_known_args(argv[1:])
    source = pathlib.Path(arguments.source)
    if source.suffix not in weight_files.READABLE:
        if source.is_file():
            raise UserError(f"--from={source} is not a file of weights: expected a name that ends in "
                            f"{', '.join(weight_files.READABLE)}, or a run folder")
        unknown = [word for word in rest if not word.startswith("--config.")]
        if unknown:
            raise _unexpected(unknown[0])
        if arguments.config or rest or arguments.fresh:
            raise UserError("--config and --fresh belong to --from=FILE: a run folder has its own "
                            "configuration")
        description = export_run(arguments.source, arguments.to, checkpoint=arguments.checkpoint,
                                 raw=arguments.raw)
        print(f"wrote {arguments.to}: {arguments.source}, {description}")
        return
    if not arguments.config:
        raise UserError("--config is missing: it names the model that the weights are for")
    if arguments.raw or arguments.checkpoint != parser.get_default("checkpoint"):
        raise UserError("--checkpoint and --raw belong to --from=RUN: a file has one set of weights")
    import_weights(arguments.source, arguments.to, _config(arguments.config, rest),
                   fresh=arguments.fresh)
    print(f"wrote {arguments.to}: a run at epoch 0 with the weights of {arguments.source}")


def _config(path, words):
    """Return the configuration that jaxcifar.main would take from the same flags."""
    from absl import flags
    written = overrides.read(path)
    for word in words:
        if not re.match(r"--config\.[\w.]+=", word):
            raise _unexpected(word)
    overrides.check(words)
    argv = ["convert", f"--config={path}", *words]
    values = flags.FlagValues()
    overrides.define("", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error
    config = values["config"].value
    overrides.settle(config, written, argv)
    config.lock()
    return config


def _unexpected(word):
    return UserError(f"unexpected argument {word!r}: fields are set as --config.FIELD=VALUE; --help "
                     "shows the rest")


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(sys.argv), "what it was writing is not complete"))
