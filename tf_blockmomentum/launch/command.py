"""The command line."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from tf_blockmomentum import progress
from tf_blockmomentum.launch import cluster, shares, status
from tf_blockmomentum.launch.launcher import GRACE_SECONDS, Launcher

HEARTBEAT = "TFBM_HEARTBEAT"  # read by MultiWorkerBlockStrategy
_NO_VALUE = ("-h", "--help", "--slurm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Args:
        arguments: as on the command line, without the command's name; None: those of this
            process.
    """
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    if options.status is not None:
        return status.show(options.status or None)
    launcher = Launcher(
        [sys.executable, *options.command],
        max_restarts=options.max_restarts,
        hang_timeout=options.hang_timeout,
        log_dir=options.log_dir,
        output=options.output,
        grace=options.grace,
        preempt_signal=options.preempt_signal,
        go_on=_what_was_typed(),
    )
    extra = {}
    if options.heartbeat is not None:
        extra[HEARTBEAT] = str(options.heartbeat)
    if options.preempt_signal is not None:
        extra[progress.PREEMPT_VARIABLE] = str(int(options.preempt_signal))
    if options.workers:
        least, most = options.elastic or (options.workers, options.workers)
        make = local_environments(options.threads_per_worker, options.gpus_per_worker, extra)
        return launcher.run(make, options.workers, least, most)
    if options.hosts:
        config = cluster.config(options.hosts, options.index)
        if options.threads_per_worker or options.gpus_per_worker is not None:
            (share,), said = shares.share_out(
                1, options.threads_per_worker, options.gpus_per_worker
            )
            extra |= share
            _say(said)
    else:
        config = cluster.slurm_config() if options.slurm else json.loads(os.environ["TF_CONFIG"])
    return launcher.run(lambda _: [{"TF_CONFIG": json.dumps(config), **extra}])


def local_environments(
    threads: int | None = None,
    gpus: int | None = None,
    extra: dict[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Callable[[int], list[dict[str, str]]]:
    """Returns what `Launcher.run` takes for workers of this machine, which share it.

    Args:
        threads: of each worker; None: its share.
        gpus: likewise.
        extra: further environment variables of every worker.
        say: what to do with the line that says what was shared out; None: print it.
    """
    last = ""

    def make(count: int) -> list[dict[str, str]]:
        nonlocal last
        shared, said = shares.share_out(count, threads, gpus)
        if said != last:  # not again at every restart
            (say or _say)(said)
            last = said
        made = cluster.environments(cluster.free_ports(count), extra or {})
        return [{**own, **share} for own, share in zip(made, shared, strict=True)]

    return make


def _say(text: str) -> None:
    print(f"tfbm-launch: {text}", file=sys.stderr, flush=True)


def _what_was_typed() -> str:
    """The command that started this process."""
    if os.path.basename(sys.argv[0]) == "tfbm-launch":
        return shlex.join(["tfbm-launch", *sys.argv[1:]])
    return shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; `command` is what follows the interpreter in a worker's command."""
    own, command = _divide(arguments)
    parser = _parser()
    options = parser.parse_args(own)
    if options.status is not None:
        others = [word for word in own if word not in ("--status", options.status)]
        if command or len(others) > (f"--status={options.status}" in own):
            parser.error(
                "--status stands alone, or with a launcher's process id or --log-dir: it asks for "
                f"jobs that run. Received: {shlex.join(arguments)}."
            )
        return options
    _check_numbers(parser, options)
    _check_ways(parser, options)
    if not command or command == ["-m"]:
        parser.error("there is no script to run. Give its path, or -m MODULE, after the options.")
    if command[0] != "-m" and not os.path.isfile(command[0]):
        parser.error(
            f"there is no script to run. Received: {command[0]!r}, which is not a file in "
            f"{os.getcwd()}. Give its path after the launcher's own options, or -m MODULE."
        )
    options.command = command
    return options


def _divide(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own options, and the script or `-m MODULE` with everything behind it:
    that is the script's, whatever it looks like, and argparse does not get to see it."""
    i = 0
    while i < len(arguments):
        argument = arguments[i]
        if argument == "--":
            return arguments[:i], arguments[i + 1 :]
        if argument == "-m" or not argument.startswith("-"):
            return arguments[:i], arguments[i:]
        i += 1 if argument in _NO_VALUE or "=" in argument else 2
    return arguments, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfbm-launch",
        usage="%(prog)s [options] SCRIPT [ARGUMENT ...]\n       %(prog)s [options] -m MODULE "
        "[ARGUMENT ...]\n       %(prog)s --status [PID]",
        description="Starts a training script on several workers. What follows the script's "
        "name is the script's.",
        allow_abbrev=False,
    )
    where = parser.add_argument_group("which workers (none of these: TF_CONFIG as it is)")
    where.add_argument("--workers", type=int, metavar="N", help="processes on this machine")
    where.add_argument("--elastic", metavar="MIN:MAX", help="bounds for their number")
    where.add_argument("--hosts", metavar="A:PORT,B:PORT", help="all workers' addresses")
    where.add_argument("--index", type=int, help="which of the hosts this one is, from 0")
    where.add_argument("--slurm", action="store_true", help="this task of a Slurm step")
    share = parser.add_argument_group("what each worker gets (--workers, --hosts)")
    share.add_argument(
        "--threads-per-worker", type=int, metavar="N", help="(the cores divided by the workers)"
    )
    share.add_argument(
        "--gpus-per-worker",
        type=int,
        metavar="N",
        help="(the GPUs, or those in CUDA_VISIBLE_DEVICES, divided by the workers); 0: none",
    )
    end = parser.add_argument_group("failures and the end")
    end.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start all again after a failure, up to N times (0); after an hour of progress the "
        "count begins anew",
    )
    end.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="no progress for so long is a failure",
    )
    end.add_argument(
        "--heartbeat", type=float, metavar="SECONDS", help="how soon a lost machine is noticed"
    )
    end.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help="after SIGTERM or Ctrl-C everything is gone within (30)",
    )
    end.add_argument(
        "--preempt-signal",
        metavar="NAME",
        help="a signal that means the same as SIGTERM, such as USR1 (sbatch --signal=USR1@60)",
    )
    shown = parser.add_argument_group("output")
    shown.add_argument(
        "--output",
        choices=("first", "all"),
        default="first" if _is_terminal() else "all",
        help="first: worker 0's output as it is, the others' in files; all: every line with its "
        "worker's number (first on a terminal, all where the output goes to a file or a pipe)",
    )
    shown.add_argument("--log-dir", help="directory for each worker's output")
    shown.add_argument(
        "--status",
        nargs="?",
        const="",
        metavar="PID",
        help="starts nothing: a table of what the workers do of each job that runs on this "
        "machine, or of one, by its launcher's process id or its --log-dir",
    )
    return parser


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.elastic:
        least, colon, most = options.elastic.partition(":")
        if not (colon and least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
            parser.error(
                "--elastic takes MIN:MAX, whole numbers with 1 <= MIN <= MAX, as in 2:4. "
                f"Received: {options.elastic!r}."
            )
        options.elastic = int(least), int(most)
        options.workers = options.elastic[1] if options.workers is None else options.workers
        if not options.elastic[0] <= options.workers <= options.elastic[1]:
            parser.error(
                f"--workers must be within --elastic. Received: --workers {options.workers} "
                f"--elastic {least}:{most}."
            )
    for name, least_value in (("workers", 1), ("max_restarts", 0), ("threads_per_worker", 1),
                              ("gpus_per_worker", 0)):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least_value:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {least_value}. Received: {value}.")
    for name in ("hang_timeout", "heartbeat", "grace"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0. Received: {value:g}.")
    if options.preempt_signal is not None:
        name = options.preempt_signal.upper()
        try:
            options.preempt_signal = signal.Signals[name if name[:3] == "SIG" else f"SIG{name}"]
        except KeyError:
            parser.error(
                "--preempt-signal takes the name of a signal, such as USR1. Received: "
                f"{options.preempt_signal!r}."
            )
        if options.preempt_signal in (signal.SIGKILL, signal.SIGSTOP):
            parser.error(f"--preempt-signal must be one that can be caught. Received: {name}.")
        if options.elastic and options.preempt_signal == signal.SIGUSR1:
            parser.error(
                "--preempt-signal USR1 and --elastic exclude each other: with --elastic, SIGUSR1 "
                "asks for more workers. Take another signal, such as USR2."
            )


def _check_ways(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    ways = [options.workers is not None, options.hosts is not None, options.slurm]
    tf_config = os.environ.get("TF_CONFIG")
    if sum(ways) > 1:
        parser.error("--workers, --hosts and --slurm exclude each other. Give one of them.")
    if any(ways) and tf_config:
        parser.error(
            "TF_CONFIG is set already, so something else starts the workers here. Received: "
            f"TF_CONFIG={tf_config!r}. Leave out --workers, --elastic, --hosts and --slurm to "
            "use it, or unset it."
        )
    if not any(ways) and not tf_config:
        parser.error("--workers is missing: the number of processes on this machine, such as 2.")
    if not any(ways):
        try:
            usable = isinstance(json.loads(tf_config or ""), dict)
        except json.JSONDecodeError:
            usable = False
        if not usable:
            parser.error(f"TF_CONFIG is not a JSON object. Received: TF_CONFIG={tf_config!r}.")
    shared = [
        f"--{name.replace('_', '-')}"
        for name in ("threads_per_worker", "gpus_per_worker")
        if getattr(options, name) is not None
    ]
    if shared and options.workers is None and options.hosts is None:
        parser.error(
            f"{' and '.join(shared)} is for --workers and --hosts: with --slurm and TF_CONFIG, "
            "whoever starts the tasks gives them their cores and GPUs."
        )
    if options.workers is not None:
        try:
            shares.share_out(
                (options.elastic or [options.workers])[-1],
                options.threads_per_worker,
                options.gpus_per_worker,
            )
        except ValueError as error:
            parser.error(str(error))
    if options.hosts is not None:
        options.hosts = options.hosts.split(",")
        if not all(map(cluster.is_address, options.hosts)):
            parser.error(
                "--hosts takes the address of every worker, as in a:2222,b:2222 or "
                f"[fd00::1]:2222,[fd00::2]:2222. Received: {','.join(options.hosts)!r}."
            )
        if options.index is None or not 0 <= options.index < len(options.hosts):
            parser.error(
                f"--index must be from 0 to {len(options.hosts) - 1}, which of the --hosts this "
                f"machine is. Received: {options.index}."
            )
