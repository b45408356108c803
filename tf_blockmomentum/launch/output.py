"""Where the workers' lines go: to the screen, to files, and to the account of a failure."""

import codecs
import collections
import contextlib
import itertools
import os
import pty
import re
import selectors
import shutil
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from tf_blockmomentum.launch.chatter import LOG_LEVEL, Quiet

AS_IT_IS, NUMBERED, HIDDEN = "as it is", "numbered", "hidden"  # how a worker's lines are shown
_KEPT = 400  # of a worker's last lines, for the account of its failure
_LONGEST = 1 << 16  # characters of one line


class Screen:
    """The launcher's own stdout and stderr, which several threads write to.

    On a terminal it also has a line of its own for the moments in which nobody writes: below
    what is there, where it stays until somebody does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_line = False  # a progress bar's, perhaps
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._written = time.monotonic()
        self._below = ""  # what takes the line away
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "")
        self.has_line = not dumb and _is_terminal(sys.stderr)

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._written

    def write(self, target: Any, text: bytes) -> None:
        """Writes as it is; what cannot be written (a closed pipe, a terminal that is gone) is
        dropped, and ends nothing."""
        if not text:
            return
        with self._lock:
            if self._below and _is_terminal(target):
                self._take_away()
            with contextlib.suppress(OSError, ValueError):
                if _is_terminal(target) or not self.has_line:
                    self._written = time.monotonic()
                    self._in_line = not text.endswith(b"\n")
                if hasattr(target, "buffer"):
                    target.flush()
                    target.buffer.write(text)
                else:  # a notebook's
                    target.write(self._decoder.decode(text))
                target.flush()

    def say(self, text: str, prefix: str = "tfbm-launch: ") -> None:
        """A line of the launcher's own."""
        start = "\n" if self._in_line else ""
        self.write(sys.stderr, f"{start}{prefix}{text}\n".encode(errors="replace"))

    def show_line(self, text: str) -> None:
        """Shows the line, or something else in it. Empty: takes it away."""
        with self._lock:
            if not text:
                self._take_away()
                return
            with contextlib.suppress(OSError, ValueError):
                if os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp():
                    return  # in the background: the terminal is somebody else's
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: not known
                text = text[: columns - 1]
                # Where the line is not empty, in the one below, with the cursor back as it was;
                # to begin with down and up again, so that there is one.
                down, back = ("\x1b7\x1b[B", "\x1b8") if self._in_line else ("", "\r")
                begin = "\x1bD\x1b[A" if self._in_line and not self._below else ""
                sys.stderr.write(f"{begin}{down}\r\x1b[2m{text}\x1b[0m\x1b[K{back}")
                sys.stderr.flush()
                self._below = f"{down}\r\x1b[2K{back}"

    def _take_away(self) -> None:
        below, self._below = self._below, ""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(below)
            sys.stderr.flush()


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

    @property
    def directory(self) -> str | None:
        """Where the files are; None: nowhere."""
        return self._directory

    def open(self, index: int, first: bool) -> "WorkerOutput":
        """Where worker `index` writes; `first`: it is the first one here."""
        how = AS_IT_IS if first else HIDDEN
        return WorkerOutput(self, index, NUMBERED if self.mode == "all" else how)

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

    `stdout` and `stderr` are the descriptors it writes to: a terminal where its lines go to one
    as they are, so that a progress bar is one that moves, else pipes. `start()` follows once it
    has them.
    """

    def __init__(self, output: Output, index: int, how: str) -> None:
        self.shown = how != HIDDEN
        self._output, self._index, self._how = output, index, how
        self._log = output.open_log(index)
        self._last: collections.deque[str] = collections.deque(maxlen=_KEPT)
        self._thread: threading.Thread | None = None
        self._terminal: int | None = None
        self._streams: dict[int, _Stream] = {}
        ends: list[int] = []
        for target in (sys.stdout, sys.stderr):
            if how == AS_IT_IS and _is_screen(target):
                if self._terminal is None:  # one for both, in the order of writing
                    self._terminal, end = _open_terminal()
                    self._streams[self._terminal] = _Stream(target)
            else:
                source, end = os.pipe()
                self._streams[source] = _Stream(target)
            ends.append(end)
        self.stdout, self.stderr = ends
        self.resize()

    def start(self, ended_well: Callable[[], bool]) -> None:
        """Begins to read, once the worker has been started.

        Args:
            ended_well: whether the worker has; asked when it has closed its output.
        """
        self._ended_well = ended_well
        for end in {self.stdout, self.stderr}:
            os.close(end)
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def resize(self) -> None:
        """Passes on the size of the screen."""
        if self._terminal is not None:
            with contextlib.suppress(OSError, termios.error):
                size = os.get_terminal_size()
                termios.tcsetwinsize(self._terminal, (size.lines, size.columns))

    def join(self, timeout: float) -> None:
        """Waits until all is read that the worker wrote."""
        if self._thread is not None:
            self._thread.join(timeout)

    def last_lines(self, most: int = 15) -> list[str]:
        """The end of the last traceback or stack, or else of everything."""
        for stream in reversed(self._streams.values()):  # stderr first
            found = _last_traceback(_plain(stream.last), most)
            if found:
                return found
        return _plain(self._last)[-most:]

    def _copy(self) -> None:
        with selectors.DefaultSelector() as selector:
            for source in self._streams:
                selector.register(source, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        data = os.read(key.fd, 1 << 16)
                    except OSError:  # a terminal whose other end is closed
                        data = b""
                    self._take(self._streams[key.fd], data)
                    if not data:
                        selector.unregister(key.fd)
        self._terminal = None
        for descriptor in (*self._streams, self._log):
            if descriptor is not None:
                os.close(descriptor)

    def _take(self, stream: "_Stream", data: bytes) -> None:
        """Passes on what the worker wrote; nothing: the stream has ended."""
        if self._log is not None and data:
            try:
                os.write(self._log, data)
            except OSError as error:  # full, or gone
                self._output.warn(
                    f"worker {self._index}'s log has gaps, it cannot be written: {error}"
                )
        heard, lines = stream.take(data, drop=not data and self._ended_well())
        self._last.extend(lines)
        if self._how == NUMBERED:
            numbered = "".join(f"[worker {self._index}] {line.rstrip()}\n" for line in lines)
            heard = numbered.encode(errors="replace")
        if self._how != HIDDEN:
            self._output.screen.write(stream.target, heard)


class _Stream:
    """A worker's stdout or stderr: what of it is heard, and its lines."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._quiet = Quiet(os.environ.get(LOG_LEVEL))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self.last: collections.deque[str] = collections.deque(maxlen=_KEPT)

    def take(self, data: bytes, drop: bool = False) -> tuple[bytes, list[str]]:
        """Takes what was written, nothing at the end; returns what is not chatter, and the lines
        that are complete. What a carriage return overwrites is a line too. `drop`: the worker
        has ended well, so that what was held back was none of its failure."""
        heard = self._quiet.heard(data, end=not data, drop=drop)
        text = self._line + self._decoder.decode(heard, not data)
        *lines, self._line = re.split(r"\r*\n|\r(?=.)", text)
        if self._line and (not data or len(self._line) > _LONGEST):
            lines.append(self._line)
            self._line = ""
        self.last.extend(lines)
        return heard, lines


def _plain(lines: Iterable[str]) -> list[str]:
    """Without colours and backspaces."""
    return [re.sub(r"\x08|\x1b\[[\d;]*m", "", line).rstrip() for line in lines]


def _last_traceback(lines: list[str], most: int) -> list[str]:
    """The end of the last traceback, or the beginning of a stack of faulthandler's, if any."""
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("Traceback (most recent call last)"):
            rest = lines[i + 1 :]
            return [lines[i], *(["  ..."] if len(rest) > most else []), *rest[-most:]]
        if re.match(r"Current thread .*most recent call first", lines[i]):
            return list(itertools.takewhile(bool, lines[i:]))[: most + 1]
    return []


def _open_terminal() -> tuple[int, int]:
    """Our end of a new terminal, and a worker's."""
    own, end = pty.openpty()
    settings = termios.tcgetattr(end)
    settings[1] &= ~termios.OPOST  # the real one does that
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(end, termios.TCSANOW, settings)
    return own, end


def _is_screen(target: Any) -> bool:
    """Whether carriage returns move on it: a terminal, or a notebook's output."""
    return _is_terminal(target) or type(target).__module__.startswith("ipykernel")


def _is_terminal(target: Any) -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
        return target.isatty()
    return False
