"""What TensorFlow writes and nobody needs to read."""

import re

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_MOST_HELD = 100  # lines


class Quiet:
    """Leaves out of a worker's output what TensorFlow says of itself, by the rules of
    `TF_CPP_MIN_LOG_LEVEL`.

    At the start: what it writes before it reads that variable. In TensorFlow 2.21 every process
    writes some lines however it is set, such as
    "I0000 00:00:1795675668.196982 24185 cudart_stub.cc:31] Could not find cuda drivers".

    At the end: that another worker is gone. No worker takes leave (TensorFlow ends its server
    with the process, without a word), so each that outlives another by some seconds reports a
    failure, even if all have done their work. Such lines are held back. Where they tell of a
    real failure, a collective of this worker fails next: they come before its traceback, or with
    the end of a process that did not end well. Otherwise nobody has missed them.

    Args:
        level: the variable's value; None: not set.
    """

    _TEXTS = (
        b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        b"To enable the following instructions: ",
    )
    _LINE = re.compile(rb"([IWEF])\d{4} \d\d:\d\d:[\d.]+ +\d+ ([^:\s]+):\d+\] ?(.*)", re.S)
    _LEAVING = ("base_collective_executor.cc", "coordination_service")  # files that it stands in
    _LEAVING_MORE = (  # how such a message goes on, on lines of their own
        b"Additional GRPC error information",
        b":UNKNOWN:Error received from peer",
        b":{",
        b"/job:",
        b"The tasks have crashed.",
    )

    _FAILURES = (b"Traceback (most recent call last)", b"Fatal Python error")

    def __init__(self, level: str | None) -> None:
        number = int(level) if level and level.isdigit() else 2 if level is None else 0
        self._severities = b"IWE"[: max(0, number)]
        self._begun, self._in_line = b"", False
        self._held: list[bytes] = []
        self._leaving = False  # the last line was of another worker that is gone

    def heard(self, data: bytes, end: bool = False, drop: bool = False) -> bytes:
        """What is left of `data`.

        Args:
            data: what was written since. The beginning of a line that may be chatter is kept
                for the next time.
            end: whether nothing follows.
            drop: whether to forget, in the end, what is held back.
        """
        if not self._severities:
            return data
        left = []
        lines = (self._begun + data).splitlines(keepends=True)
        self._begun = b""
        for line in lines:
            whole = line.endswith(b"\n") or end
            if self._in_line:
                left.append(line)
            elif not whole and self._may_be_chatter(line):
                self._begun = line
                break
            elif self._is_leaving(line):
                self._held.append(line)
                if len(self._held) == _MOST_HELD:
                    left += self._released()
            elif not self._is_chatter(line):
                if line.startswith(self._FAILURES):
                    left += self._released()
                left.append(line)
            self._in_line = not line.endswith((b"\n", b"\r"))
        if end and not drop:
            left += self._released()
        return b"".join(left)

    def _released(self) -> list[bytes]:
        held, self._held = self._held, []
        return held

    def _is_leaving(self, line: bytes) -> bool:
        found = self._LINE.match(line)
        if found:
            of_it = found[2].decode(errors="replace").startswith(self._LEAVING)
            self._leaving = of_it and found[1] not in self._severities + b"F"
        elif not line.startswith(self._LEAVING_MORE):
            self._leaving = False
        return self._leaving

    def _is_chatter(self, line: bytes) -> bool:
        if line.startswith(self._TEXTS):
            return True
        found = self._LINE.match(line)
        if not found:
            return False
        # That there is no GPU is no error.
        return found[1] in self._severities or found[2].startswith(b"cuda_platform")

    def _may_be_chatter(self, line: bytes) -> bool:
        texts = [*self._TEXTS]
        texts += self._LEAVING_MORE if self._leaving else ()
        if any(text.startswith(line) or line.startswith(text) for text in texts):
            return True
        if self._held and any(text.startswith(line) for text in self._FAILURES):
            return True
        return bool(re.fullmatch(rb"[IWE](\d{1,3}|\d{4}( .*)?)?", line, re.S))
