"""Step time and bytes of a script, from its first blocks on one worker."""

import json
import os
import shlex
import subprocess
import sys
import tempfile


def measure(script: str, timeout: float) -> tuple[float, float]:
    """Runs a script on one worker until it has trained a few blocks, and ends it.

    Args:
        script: its path, and its arguments, as on a command line.
        timeout: seconds.

    Returns:
        Seconds of a local step, and the bytes that a boundary averages.

    Raises:
        ValueError: there is no such script, it failed, it trained no block, or it took longer.
    """
    command = shlex.split(script)
    if not command or not os.path.isfile(command[0]):
        raise ValueError(f"--measure takes the path of a script. Received: {script!r}: no file.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "measured.json")
        environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        module = "tf_blockmomentum.report.probe"
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, path, *command],
                env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{command[0]} has not trained three blocks in {timeout:g} s. Give it a smaller "
                "job, or --timeout more."
            ) from None
        if not os.path.exists(path):
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise ValueError(
                f"{command[0]} ended with status {done.returncode} before it had trained three "
                f"blocks in a fit with tfbm.BlockTraining(). Its last lines:\n{last}"
            )
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    return found["step"], found["bytes"]
