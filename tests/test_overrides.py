"""Configuration files of one's own and their mistakes; fields and models set on the command line."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags

from jaxcifar import config as config_lib
from jaxcifar import main, overrides
from jaxcifar.errors import UserError

FILE = """from jaxcifar import config as config_lib

def get_config():
    config = config_lib.default()
    {}
    return config
"""


def written(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("line", "message"), [
    ("config.lr = 0.1", "mine.py:5: there is no config field 'lr' (did you mean --config.optimizer."
                        "learning_rate?)"),
    ("config.cutout = 16", "mine.py:5: there is no config field 'cutout' (did you mean "
                           "--config.augment?)"),
    ("config.momentum = 0.9", "there is no config field 'momentum' (did you mean --config.optimizer."
                              "momentum?)"),
    ("config.lookahead_every = 5", "mine.py:5: there is no config field 'lookahead_every'; jaxcifar/"),
    ("config.optimizer.nestrov = True",
     "mine.py:5: there is no config field 'nestrov' (did you mean 'nesterov'?)"),
    ("config.batch_sise", "mine.py:5: there is no config field 'batch_sise' (did you mean "
                          "'batch_size'?)"),
    ("config.epochs = '10'", "mine.py:5: config.epochs must be of type int, not str"),
    ("config.model = 'resnet18'", "mine.py:5: config.model must be of type ConfigDict, not str"),
    ("config.augment = ['flip']", "mine.py:5: config.augment must be of type str, not list"),
    ("import nowhere_to_be_found", "mine.py:5: ModuleNotFoundError: No module named 'nowhere"),
    ("config.epochs = = 3", "mine.py:5: SyntaxError: invalid syntax"),
    ("return None", "mine.py: get_config() returned None, no configuration"),
])
def test_a_mistake_in_a_file_is_one_line_with_its_place(line, message, tmp_path):
    with pytest.raises(UserError) as caught:
        overrides.read(written(tmp_path, FILE.format(line)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_the_function_is_named(tmp_path):
    with pytest.raises(UserError, match="defines no function get_config"):
        overrides.read(written(tmp_path, "CONFIG = 1"))


def test_the_program_prints_that_line(tmp_path):
    path = written(tmp_path, FILE.format("config.lr = 0.1"))
    done = subprocess.run([sys.executable, "-m", "jaxcifar.main", f"--config={path}"], text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}:5: there is no config")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("line", "message"), [
    ("config.augment = None", "config.augment = None: must be of type str, as its default"),
    ("config.max_params = None", "config.max_params = None: must be of type int"),
    ("config.seed = True", "config.seed = True: must be of type int"),
    ("config.mean = (125.0, 123.0, 114.0)", "not of 0 to 255"),
    ("config.std = (63.0, 62.0, 67.0)", "not of 0 to 255"),
    ("config.schedule.patience = -1", "config.schedule.patience = -1: must be 0 or more"),
    ("config.schedule.warmup_epochs = -1.0", "schedule.warmup_epochs = -1.0: must be 0 or more"),
])
def test_a_value_of_no_use_is_refused(line, message, tmp_path):
    config = overrides.read(written(tmp_path, FILE.format(line)))
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert message in str(caught.value)


def parsed(path, *words):
    """Return the configuration of a command line, and the options that another model dropped."""
    argv = ["main", f"--config={path}", *words]
    values = flags.FlagValues()
    overrides.define("", flag_values=values, sys_argv=argv)
    values(argv)
    config = values["config"].value
    return config, overrides.settle(config, overrides.read(path), argv)


def test_another_model_comes_without_the_options_of_the_files(tmp_path):
    path = written(tmp_path, FILE.format(
        "config.model = config_lib.model('resnet5m', channels=(4, 8), pool=2)"))
    config, dropped = parsed(path, "--config.model.name=resnet18", "--config.model.pool=4")
    assert dict(config.model) == {"name": "resnet18", "pool": 4} and dropped == ["channels"]
    config, dropped = parsed(path, "--config.model.name=resnet5m", "--config.model.pool=4")
    assert dict(config.model) == {"name": "resnet5m", "channels": (4, 8), "pool": 4}
    assert dropped == []


def test_a_second_configuration_file_is_refused(tmp_path):
    path = written(tmp_path, FILE.format(""))
    assert main._read_config_file(["main", f"--config={path}", "--config.seed=1"]) is not None
    for words in ([f"--config={path}", f"--config={path}:b"], ["-config", path, "--config", "b.py"]):
        with pytest.raises(UserError, match="--config is given 2 times .*one configuration file"):
            main._read_config_file(["main", *words])


def test_a_missing_configuration_says_what_is_given_and_where_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(main.__file__).parent.parent)
    with pytest.raises(UserError, match=r"missing \(--confg=a.py is given\).*configs/resnet5m.py"):
        main._read_config_file(["main", "--confg=a.py"])
    monkeypatch.chdir(tmp_path)
    for words in (["--config=configs/resnet5m.py"], []):
        with pytest.raises(UserError, match="run this in the repository's folder, where configs/ is$"):
            main._read_config_file(["main", *words])


def test_help_is_no_failure(monkeypatch):
    monkeypatch.setattr(main.flags, "FLAGS", lambda argv: sys.exit(1))  # as absl does after the text
    for words, code in ((["--help"], 0), (["--other"], 1)):
        with pytest.raises(SystemExit) as caught:
            main._parsed(["main", *words])
        assert caught.value.code == code


def test_a_tilde_after_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["main", "--config=~/mine.py:wide", "--config.init_from=~/a run"]
    main._expand_home_of_config(argv)
    assert argv == ["main", "--config=/home/me/mine.py:wide", "--config.init_from=~/a run"], (
        "a field stays as it is: the hash of a configuration must not depend on the home folder")
