"""Commands of argparse: mistakes and Ctrl-C are one line; the scripts' own flags."""

import os
import pathlib
import runpy
import subprocess
import sys
import warnings

import pytest

from jaxcifar import command
from jaxcifar.benchmark import driver
from jaxcifar.data import prepare
from jaxcifar.errors import UserError
from jaxcifar.report import models_page, parity

ROOT = pathlib.Path(__file__).resolve().parent.parent


def stopped(*args, **options):
    """Stand for a call that Ctrl-C ends."""
    raise KeyboardInterrupt


def script(name, *arguments):
    """Run scripts/NAME.py in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(
            (SystemExit, KeyboardInterrupt)) as ended:  # this would end the tests
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return getattr(ended.value, "code", None)


def test_how_a_call_ends_is_its_exit_code(capsys):
    def wrong():
        raise UserError("no such thing")

    assert [command.run(act) for act in (lambda: None, lambda: 3, wrong)] == [0, 3, 2]
    assert capsys.readouterr().err == "error: no such thing\n"
    assert command.run(stopped, "all is kept") == 130
    assert capsys.readouterr().err == "\nstopped; all is kept\n"


@pytest.mark.parametrize(("text", "number"), [
    ("-1", int), ("1.5", int), ("x", int), ("-0.5", float), ("nan", float), ("inf", float)])
def test_numbers_out_of_bounds_are_one_line(text, number):
    parser = command.Parser("")
    parser.add_argument("--n", type=command.at_least(0, number))
    assert parser.parse_args(["--n=7"]).n == 7
    with pytest.raises(UserError, match=f"argument --n: '{text}' is not a .*number from 0 up; .*--help"):
        parser.parse_args([f"--n={text}"])


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    parser = command.Parser("")
    parser.add_argument("--out", default="~/default")
    assert parser.parse_args([]).out == "/home/of/me/default"
    assert parser.parse_args(["--out=~/x"]).out == "/home/of/me/x"


@pytest.mark.parametrize("flag", ["--repeats=-1", "--batch=-5", "--threads=-1", "--limit=-4",
                                  "--seconds=-1", "--epoch_steps=-1"])
def test_the_benchmark_refuses_negative_numbers(flag, capsys, monkeypatch):
    monkeypatch.setattr(driver, "run", lambda **_: pytest.fail("it was accepted"))
    assert script("benchmark", flag) == 2
    assert capsys.readouterr().err.startswith(f"error: argument {flag.partition('=')[0]}: '-")


@pytest.mark.parametrize(("name", "arguments", "module", "call", "said"), [
    ("benchmark", ["--quick"], driver, "run", "the same command with --resume goes on"),
    ("benchmark", ["--work=step:lenet"], driver, "run", "nothing was written"),
    ("prepare_data", [], prepare, "prepare", "the same command goes on"),
    ("parity", ["--report-only"], parity, "report", "the same command goes on"),
    ("models_page", [], models_page, "page", "nothing was written"),
])
def test_ctrl_c_is_one_line(name, arguments, module, call, said, capsys, monkeypatch):
    monkeypatch.setattr(module, call, stopped)
    assert script(name, *arguments) == 130
    assert capsys.readouterr().err == f"\nstopped; {said}\n"


@pytest.mark.parametrize(("flags", "said"), [
    ([], "nothing was written (--out keeps each finished run)"),
    (["--out=there"], "the finished runs are in there"), (["--profile"], "nothing was written")])
def test_ctrl_c_in_a_speedrun_is_one_line(flags, said):
    code = ("import runpy\nfrom jaxcifar.speedrun import driver, profile\n"
            "def run(*args, **options):\n    raise KeyboardInterrupt\n"
            "driver.run = profile.run = run\n"
            "runpy.run_module('jaxcifar.speedrun', run_name='__main__', alter_sys=True)")
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=configs/speedrun.py:94", *flags], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, f"\nstopped; {said}\n")


def test_the_page_of_models_is_made_without_arguments_and_warnings(monkeypatch, capsys):
    def page(accuracies, speeds):
        warnings.warn("a stem of ImageNet", stacklevel=1)
        raise UserError("far enough")

    monkeypatch.setattr(models_page, "page", page)
    assert script("models_page", "--help") == 0
    assert script("models_page", "--hepl") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert script("models_page") == 2
    assert capsys.readouterr().err.endswith("error: far enough\n")
