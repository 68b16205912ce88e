"""What README.md and docs/performance.md say of commands and results is so."""

import pathlib
import re
import shlex

import pytest
from test_muon import config_of

from jaxcifar import config as config_lib
from jaxcifar.report import parity_page, parity_results, parity_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
_COMMAND = r"python (?:-m jaxcifar\.\w+|scripts/\w+\.py)[^\n`#&]*"
COMMANDS = re.findall(_COMMAND, README.replace("\\\n", " ") + PERFORMANCE)


def source_of(words):
    """Return the text of the files that declare a command's flags."""
    if words[1] != "-m":
        return (ROOT / words[1]).read_text(encoding="utf-8")
    room = ROOT / "jaxcifar" / words[2].split(".")[1]
    files = [room.with_suffix(".py")] if room.with_suffix(".py").exists() else room.glob("*.py")
    files = [*files, ROOT / "jaxcifar" / "main.py", ROOT / "jaxcifar" / "inference.py"]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def test_there_are_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_configuration_and_flags_are_there(command):
    words = shlex.split(command)
    given = [word for word in words if word.startswith("--config")]
    if given:
        config_lib.validate(config_of(shlex.join(["python", "-m", "jaxcifar.main", *given])))
    declared = source_of(words)
    for word in words:
        if word.startswith("--") and word not in given:
            name = word[2:].partition("=")[0]
            assert f'"{name}"' in declared or f'"--{name}"' in declared, word


def test_the_readme_counts_what_is_measured():
    words = " ".join(README.split())
    rows = parity_results.fresh(parity_results.read(ROOT), parity_rows.recipes(ROOT))
    assert f"{len(rows)} rows of [docs/parity.md]" in words
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    cells = re.search(r"\| all \|.*\|", page)[0].split("|")
    long_held, long_all = cells[4].split(" of ")
    short_held, short_all = cells[5].split(" of ")
    assert (f"Of their {long_all.strip()} published numbers from runs of 10 epochs or more "
            f"{long_held.strip()} hold") in words
    assert f"{cells[6].strip()} are better by more than that" in words
    assert short_held.strip() == short_all.strip()
    assert f"all {short_all.strip()} of two-epoch runs" in words


def test_the_readme_s_accuracies_are_the_page_s():
    lines = re.findall(r"^\| `([\w/.-]+)`.*\| ([^|]+) \| ([^|]+\(\d\)) \|$", README, re.MULTILINE)
    _, _, _, judged = parity_page.gather(ROOT)
    found = {v.row: (parity_page.published_text(v.number), parity_page.ours_text(v)) for v in judged
             if v.ours and v.number.metric in ("test_accuracy", "kaggle_accuracy")}
    assert {row: texts for row, *texts in lines} == {row: list(texts) for row, texts in found.items()}
