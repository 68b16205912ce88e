"""The command line: exit codes, one-line errors, signals, and the run folder that quickstart leaves."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ["--config.model.channels=(4,8,8)", "--config.model.stem_width=4", "--config.progress=False"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with a data folder and a compilation cache of its own."""
    folder = tmp_path_factory.mktemp("home")
    return os.environ | {"TFDS_DATA_DIR": str(folder / "data"), "XDG_CACHE_HOME": str(folder),
                         "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def start(environment, workdir, *arguments, config="configs/quickstart.py"):
    """Start jaxcifar.main in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxcifar.main", f"--config={config}", f"--workdir={workdir}",
         *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)


def finish(process, timeout=240):
    """Return (exit code, stdout, stderr) once the process has ended."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for_rows(workdir, count, process):
    """Wait until metrics.jsonl holds `count` rows."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    for _ in range(2400):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.1)
    raise AssertionError(f"no {count} rows in four minutes")


def test_quickstart_is_stopped_resumed_and_leaves_a_run_folder(environment, tmp_path):
    small = [*SMALL, "--config.epochs=4", "--config.batch_size=250"]
    for signum, rows in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        process = start(environment, tmp_path, *small)
        wait_for_rows(tmp_path, rows, process)
        process.send_signal(signum)
        code, _, err = finish(process)
        assert code == 128 + signum, err
        assert "the same command goes on from here" in err and "Traceback" not in err
    code, out, err = finish(start(environment, tmp_path, *small))
    assert code == 0, err
    assert "resumed after epoch" in out
    files = {p.name for p in tmp_path.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "result.json", "checkpoints", "tensorboard",
                     "curves.png", "confusion_matrix.png", "samples.png"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["epochs"] == 4 and result["test_accuracy"] > 12
    assert [json.loads(r)["epoch"] for r in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_seeds_leave_a_folder_each_and_their_summary(environment, tmp_path):
    code, out, err = finish(start(environment, tmp_path, *SMALL, "--config.epochs=1", "--seeds=0,1",
                                  "--seeds_together=yes", "--config.batch_size=250"))
    assert code == 0, err
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    assert len(summary["metrics"]["test_accuracy"]["values"]) == 2
    assert "seeds: " in out
    assert (tmp_path / "seed1" / "result.json").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.selection=best_val_los"], "did you mean 'best_val_loss'"),
    (["--config.augment=flop"], "flip"),
    (["--config.batch_sise=64"], "no config field 'batch_sise' (did you mean 'batch_size'?)"),
    (["--config.modle.name=vit"], "no config field 'modle' (did you mean 'model'?)"),
    (["--config.optimizer.nane=sgd"], "no config field 'nane' (did you mean 'name'?)"),
    (["--config.dataset.name=cifar10"], "set it as --config.dataset=VALUE"),
    (["--config.optimizer=sgd"], "as in --config.optimizer.name=VALUE"),
    (["--noconfig.progess"], "no config field 'progess' (did you mean 'progress'?)"),
    (["--config.model.chanels=3"], "option of model 'resnet5m' 'chanels' (did you mean 'channels'?)"),
    (["--config.model.bottleneck=yes"],
     "config.model.bottleneck = 'yes': must be of the kind of its default, False"),
    (["--config.model.stem_kernel=none"], "must be of the kind of its default, 3"),
    (["--config.epochs=many"], "flag --config.epochs=many"),
    (["epochs=3"], "unexpected argument 'epochs=3'"),
    (["--profile", "--seeds=0,1"], "--profile traces one run"),
    (["--profile_steps=3"], "--profile_steps needs --profile"),
    (["--profile", "--profile_steps=0"], "give a number of steps from 1 up"),
    (["--config.dataset=cifar10", "--config.data_dir=nowhere"], "scripts/prepare_data.py"),
    (["--epochs=1"], "unknown flag --epochs (did you mean --config.epochs?)"),
    (["--lr", "0.1"], "unknown flag --lr (did you mean --config.optimizer.learning_rate?)"),
    (["--batch-size=32"], "unknown flag --batch-size (did you mean --config.batch_size?)"),
    (["--wrkdir=x"], "unknown flag --wrkdir (did you mean 'workdir'?)"),
    (["--resume"], "the same command with the same --workdir goes on"),
    (["--config.lr=0.1"],
     "no config field 'lr' (did you mean --config.optimizer.learning_rate?)"),
    (["--seeds=0", "--config.seed=7"], "leave --config.seed out"),
    (["--num_processes=2", "--process_id=1"], "need --coordinator=HOST:PORT"),
    (["--config.model.num_classes=100"], "config.model.num_classes is no option of a model"),
    (["--config.augment=crop(32)"], "RandomCrop(32, padding=4) is crop(4)"),
    (["--config.augment=crop(4),flip"], "operations are separated by |"),
    (["--config.optimizer.name=sgd", "--config.optimizer.eps=1e-3"], "leave it at 1e-08"),
])
def test_a_mistake_is_one_line_and_an_exit_code(arguments, message, environment, tmp_path):
    code, _, err = finish(start(environment, tmp_path / "run", *arguments))
    assert code == 2
    assert message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(("config", "message"), [
    ("configs/quikstart.py", "(did you mean 'configs/quickstart.py'?)"),
    ("configs/resnet5m.py:model9", "unknown variant 'model9' (did you mean 'model"),
    ("configs/quickstart.py:small", "configs/quickstart.py has no variants: leave out ':small'"),
])
def test_a_wrong_configuration_file_or_variant(config, message, environment, tmp_path):
    code, _, err = finish(start(environment, tmp_path / "run", config=config))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_profile_prints_two_tables_and_writes_traces(environment, tmp_path):
    code, out, err = finish(start(environment, tmp_path, *SMALL, "--profile", "--profile_steps=2"))
    assert code == 0, err
    assert "2 training steps of 96 images, resnet5m on cpu" in out
    assert "2 evaluation batches of 100 images" in out and "between calls it waited" in out
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_a_profile_that_is_stopped_says_so_in_a_line(environment, tmp_path):
    process = start(environment, tmp_path, *SMALL, "--profile")
    assert "compiled in" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err.strip() == "stopped; nothing was trained"


def test_a_speedrun_is_not_profiled(environment, tmp_path):
    code, _, err = finish(start(environment, tmp_path / "run", "--profile",
                                config="configs/speedrun.py:94"))
    assert code == 2 and "a loop of its own" in err and len(err.strip().splitlines()) == 1, err


def test_a_file_in_the_way_of_the_workdir(environment, tmp_path):
    (tmp_path / "run").write_text("in the way")
    code, _, err = finish(start(environment | {"HOME": str(tmp_path)}, "~/run"))
    assert code == 2 and str(tmp_path / "run") in err and "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_the_run(environment, tmp_path):
    code, _, err = finish(start(environment, tmp_path, *SMALL, "--config.batch_size=250",
                                "--config.optimizer.learning_rate=1e30"))
    assert code == 1, err
    assert "the loss is not finite at step" in err and "learning_rate" in err


def test_an_option_of_the_model_that_the_configuration_leaves_out(environment, tmp_path):
    code, out, err = finish(start(environment, tmp_path / "run", "--profile", "--profile_steps=1",
                                  *SMALL, "--config.model.stem_kernel=5"))
    assert code == 0, err
    assert "images, resnet5m on cpu" in out
