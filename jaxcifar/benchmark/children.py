"""What the parents of child processes share: their environment, and what a dead one said."""

import os
import pathlib

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment():
    """Return this process's environment for a child, with this package first on its path: a dict."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join(
        filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))))


def last_words(process, errors):
    """Wait for a process to end; return its exit code and the last line of `errors`, in words.

    process: subprocess.Popen. errors: a text file, open for reading, of its standard error.
    """
    process.wait()
    errors.seek(0)
    lines = errors.read().strip().splitlines() or ["no message"]
    return f"its process ended (exit code {process.returncode}): {lines[-1]}"
