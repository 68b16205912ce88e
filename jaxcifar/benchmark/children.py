"""A child process that measures: how its parent starts it, listens to it and ends it."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

from jaxcifar.errors import UserError

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class TimedOut(UserError):
    """A child did not answer within its limit."""


class Child:
    """A process that answers in lines of JSON; its standard error goes to a temporary file.

    name: what it is called in messages.
    """

    def __init__(self, name, module, argument, **environment):
        """Start `python -m module argument`, with this package first on its path."""
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, argument], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": path, **environment})

    def send(self, line):
        """Write a line to it; nothing where it has ended, which `receive` reports."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def receive(self, limit=0, *, may_end=False):
        """Return its next message, a dict; None where it ends without an error and `may_end`.

        limit: seconds until the message has to be there; 0: none. Raises TimedOut, or UserError
        with its "error" message or its last words; the process is ended then.
        """
        line = self._line(limit)
        if not line and may_end and self._process.wait() == 0:
            return None
        message = json.loads(line) if line else {"error": self._last_words()}
        if "error" in message:
            self.close()
            raise UserError(f"{self.name}: {message['error']}")
        return message

    def close(self):
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                file.close()

    def _line(self, limit):
        """Return the next line of its output, "" at the end; raise TimedOut after `limit` seconds."""
        late = threading.Event()

        def end():
            late.set()
            self._process.kill()

        timer = threading.Timer(limit, end) if limit else None
        if timer:
            timer.start()
        try:
            line = self._process.stdout.readline()
        finally:  # after Ctrl-C too: the program would wait for it
            if timer:
                timer.cancel()
        if late.is_set():
            self.close()
            raise TimedOut(f"{self.name}: no answer within {limit} s")
        return line

    def _last_words(self):
        """Wait for its end; return its exit code and the last line of its standard error, in words."""
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return f"its process ended (exit code {self._process.returncode}): {lines[-1]}"
