"""Where the workers' lines go: to the screen, to files, and to the account of a failure."""

import codecs
import collections
import contextlib
import itertools
import os
import pty
import re
import shutil
import sys
import tempfile
import termios
import threading
import time
from typing import Any

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_decoder = codecs.getincrementaldecoder("utf-8")
_KEPT = 400  # of a worker's last lines, for the account of its failure


class Screen:
    """The launcher's own stdout and stderr, which several threads write to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_line = False  # a progress bar's, perhaps

    def write(self, target: Any, text: bytes) -> None:
        """Writes as it is; what cannot be written (a closed pipe, a terminal that is gone) is
        dropped, and ends nothing."""
        if not text:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._in_line = not text.endswith(b"\n")
            if hasattr(target, "buffer"):
                target.flush()
                target.buffer.write(text)
            else:  # a notebook's
                target.write(text.decode(errors="replace"))
            target.flush()

    def say(self, text: str, prefix: str = "tfbm-launch: ") -> None:
        """A line of the launcher's own."""
        start = "\n" if self._in_line else ""
        self.write(sys.stderr, f"{start}{prefix}{text}\n".encode(errors="replace"))


class Output:
    """What becomes of the output of a job's workers, over all its starts.

    Args:
        mode: "first": the first worker's on the screen, as it writes it; "all": everybody's
            lines, with their worker's number.
        log_dir: directory for `worker-I.log`; None: with "first" a temporary one, which is
            removed unless the job fails; with "all" none.
    """

    def __init__(self, mode: str = "first", log_dir: str | None = None) -> None:
        self.mode, self.screen = mode, Screen()
        self._given, self._directory = log_dir, log_dir
        self._warned: set[str] = set()
        self.logs: list[str] = []

    def open(self, index: int, first: bool) -> "WorkerOutput":
        """Where worker `index` writes; `first`: it is the first one here."""
        shown = "as it is" if first else "not"
        return WorkerOutput(self, index, "lines" if self.mode == "all" else shown)

    def open_log(self, index: int) -> int | None:
        """A file for a worker's output, or None."""
        try:
            if self._directory is None and self.mode == "first":
                self._directory = tempfile.mkdtemp(prefix="tfbm-launch-")
            if self._directory is None:
                return None
            os.makedirs(self._directory, exist_ok=True)
            path = os.path.join(self._directory, f"worker-{index}.log")
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            self.warn(f"there will be no log of worker {index}: {error}")
            return None
        if path not in self.logs:
            self.logs.append(path)
        return file

    def warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.screen.say(f"warning: {text}")

    def close(self, keep: bool) -> None:
        """Removes temporary files unless they are needed."""
        if self._given is None and self._directory is not None and not keep:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory, self.logs = None, []


class WorkerOutput:
    """One worker's stdout and stderr, from its start to its end.

    `stdout` and `stderr` are the descriptors it writes to; `start()` follows once it has them.
    """

    def __init__(self, output: Output, index: int, shown: str) -> None:
        self.shown = shown != "not"
        self._output, self._index, self._how = output, index, shown
        self._log = output.open_log(index)
        self._last: collections.deque[str] = collections.deque(maxlen=_KEPT)
        self._threads: list[threading.Thread] = []
        self._terminal: int | None = None
        self._sources: list[tuple[int, Any]] = []
        self._made: list[int] = []
        self.stdout = self._make(sys.stdout)
        self.stderr = self._make(sys.stderr)

    def _make(self, target: Any) -> int:
        """What the worker writes to: a terminal where its lines go to one as they are, so that
        a progress bar is one that moves; else a pipe."""
        if self._how != "as it is" or not _is_screen(target):
            source, end = os.pipe()
        elif self._terminal is not None:
            return self._made[0]  # the same terminal for both: in the order of writing
        else:
            self._terminal = source = self._open_terminal()
            end = self._made[-1]
            self._sources.append((source, target))
            return end
        self._sources.append((source, target))
        self._made.append(end)
        return end

    def _open_terminal(self) -> int:
        master, end = pty.openpty()
        settings = termios.tcgetattr(end)
        settings[1] &= ~termios.OPOST  # the real one does that
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(end, termios.TCSANOW, settings)
        self._made.insert(0, end)
        self._size(end)
        return master

    def start(self) -> None:
        """Begins to read, once the worker has been started."""
        for end in self._made:
            os.close(end)
        for source, target in self._sources:
            thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _size(self, descriptor: int) -> None:
        with contextlib.suppress(OSError, termios.error):
            size = os.get_terminal_size()
            termios.tcsetwinsize(descriptor, (size.lines, size.columns))

    def resize(self) -> None:
        """Passes on the size of the screen."""
        if self._terminal is not None:
            self._size(self._terminal)

    def join(self, timeout: float) -> None:
        """Waits until all is read that the worker wrote."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._log is not None and not any(thread.is_alive() for thread in self._threads):
            os.close(self._log)
            self._log = None

    def last_lines(self, most: int = 15) -> list[str]:
        """The end of the last traceback or stack, or else of everything."""
        lines = [re.sub(r"\x08|\x1b\[[\d;]*m", "", line).rstrip() for line in self._last]
        for i in range(len(lines) - 1, -1, -1):
            if lines[i].startswith("Traceback (most recent call last)"):
                rest = lines[i + 1 :]
                return [lines[i], *(["  ..."] if len(rest) > most else []), *rest[-most:]]
            if re.match(r"Current thread .*most recent call first", lines[i]):  # faulthandler's
                return list(itertools.takewhile(bool, lines[i:]))[: most + 1]
        return lines[-most:]

    def _copy(self, source: int, target: Any) -> None:
        quiet, decoder = _Quiet(os.environ.get(LOG_LEVEL)), _decoder("replace")
        line = ""
        while True:
            try:
                data = os.read(source, 1 << 16)
            except OSError:  # a terminal whose other end is closed
                data = b""
            self._write_log(data)
            heard = quiet.heard(data, end=not data)
            if self._how == "as it is":
                self._output.screen.write(target, heard)
            text = line + decoder.decode(heard, not data)
            *lines, line = re.split(r"\r*\n|\r(?=.)", text)
            lines += [line] if line and not data else []
            self._last.extend(lines)
            if self._how == "lines":
                numbered = "".join(f"[worker {self._index}] {own.rstrip()}\n" for own in lines)
                self._output.screen.write(target, numbered.encode(errors="replace"))
            if not data:
                break
        os.close(source)

    def _write_log(self, data: bytes) -> None:
        if self._log is not None and data:
            try:
                os.write(self._log, data)
            except OSError as error:  # full, or gone
                self._output.warn(
                    f"worker {self._index}'s log has gaps, it cannot be written: {error}"
                )


class _Quiet:
    """Leaves out what TensorFlow writes before it reads `TF_CPP_MIN_LOG_LEVEL`, by its rules.

    In TensorFlow 2.21 every process writes some lines however the variable is set, such as
    "I0000 00:00:1795675668.196982 24185 cudart_stub.cc:31] Could not find cuda drivers".
    """

    _TEXTS = (
        b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        b"To enable the following instructions: ",
    )

    def __init__(self, level: str | None) -> None:
        number = int(level) if level and level.isdigit() else 2 if level is None else 0
        self._severities = b"IWE"[: max(0, number)]
        self._held, self._in_line = b"", False

    def heard(self, data: bytes, end: bool = False) -> bytes:
        """What is left of `data`; the beginning of a line that may be chatter is held back."""
        if not self._severities:
            return data
        left = []
        for line in (self._held + data).splitlines(keepends=True):
            if self._in_line:
                left.append(line)
            elif not line.endswith(b"\n") and not end and self._may_be_chatter(line):
                self._held = line
                return b"".join(left)
            elif not self._is_chatter(line):
                left.append(line)
            self._in_line = not line.endswith((b"\n", b"\r"))
        self._held = b""
        return b"".join(left)

    def _is_chatter(self, line: bytes) -> bool:
        if line.startswith(self._TEXTS):
            return True
        found = re.match(rb"([IWEF])\d{4} \d\d:\d\d:[\d.]+ +\d+ (\S+:\d+)\]", line)
        if not found:
            return False
        # That there is no GPU is no error.
        return found[1] in self._severities or found[2].startswith(b"cuda_platform")

    def _may_be_chatter(self, line: bytes) -> bool:
        texts = any(text.startswith(line) or line.startswith(text) for text in self._TEXTS)
        return texts or bool(re.fullmatch(rb"[IWE](\d{1,3}|\d{4}( .*)?)?", line, re.S))


def _is_screen(target: Any) -> bool:
    """Whether carriage returns move on it: a terminal, or a notebook's output."""
    with contextlib.suppress(AttributeError, ValueError):
        if target.isatty():
            return True
    return type(target).__module__.startswith("ipykernel")
