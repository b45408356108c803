"""Starts a training script on several workers, watches them, and starts them again.

    python -m tf_blockmomentum.launch --workers 4 train.py --epochs 10
    python -m tf_blockmomentum.launch --workers 4 -m package.train --epochs 10

starts four processes of `train.py --epochs 10` on this machine, each with the `TF_CONFIG` that
makes it one worker of a cluster on free local ports; `MultiWorkerBlockStrategy` reads it. What
follows the script's name is the script's own. The workers share the machine: each gets its part
of the cores and of the GPUs (`--threads-per-worker`, `--gpus-per-worker`), unless environment
variables say otherwise.

On a terminal worker 0's output is shown as it writes it, and the others' goes to files
(`--output first`). In a file or a pipe every line has its worker's number in front
(`--output all`). As soon as one worker fails, the others are ended and its exit status becomes
this command's (128 + n for signal n); what failed first stands last on the screen.

`tfbm-launch --status` shows what the workers of a job that runs do. On a terminal on which nothing
moves, a line below does.

SIGTERM or Ctrl-C: every worker gets SIGTERM, and what still runs after `--grace` seconds is
killed; a script with `tfbm.BlockBackup` ends its block and writes a backup. The exit status is
143 (Ctrl-C: 130). A worker that gets SIGTERM by itself takes the others with it in the same way.

Started again: with `--max-restarts N` the whole job is, up to N times, counted anew after an
hour of progress; a script that uses `tfbm.BlockBackup` goes on from its last complete backup. A
launcher that got SIGTERM itself starts nothing again. `--hang-timeout SECONDS` also ends a
job whose workers all stopped making progress (no block, validation batch or backup finished;
it has to be longer than start, compilation and the longest block), names the worker the others
wait for and prints its Python stack. `--elastic MIN:MAX` goes on with one worker fewer when the
same one fails first twice in a row, and with MAX again when this process gets SIGUSR1.
`--heartbeat SECONDS` is how soon TensorFlow notices that a machine is gone; a process that ends
on this machine is noticed at once.

Several machines, this command on each:

    tfbm-launch --hosts a:2222,b:2222 --index 0 train.py    # on a; --index 1 on b
    srun tfbm-launch --slurm train.py                       # TensorFlow's SlurmClusterResolver
    tfbm-launch train.py                                    # TF_CONFIG is set already

Local workers bind to the loopback address. TensorFlow's gRPC has no authentication and no
encryption: whoever reaches a worker's port can run code there, so give `--hosts` only
addresses on a private network.
"""

from tf_blockmomentum.launch.cluster import environments, free_ports
from tf_blockmomentum.launch.command import main
from tf_blockmomentum.launch.launcher import Launcher

__all__ = ["Launcher", "environments", "free_ports", "main"]
