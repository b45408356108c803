"""Workers of one machine share its cores and GPUs, and what the user has set wins."""

import json
import os

import pytest
from launching import COMMAND, run, write

from tf_blockmomentum.launch import shares

NAMES = [*shares.THREADS, shares.VISIBLE, shares.GROWTH]


def given_to(tmp_path, *options, cores=None, env=None, limit=60):
    """What each of the workers finds in its environment, and what the launcher said."""
    script = write(tmp_path, f"print(json.dumps([os.environ.get(n) for n in {NAMES}]))")
    affinity = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    done = run(*options, script, env=env, limit=limit, preexec_fn=affinity)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    return [json.loads(line.partition("] ")[2]) for line in lines], done.stderr


def test_cores_are_shared_by_affinity(tmp_path):
    """The affinity of this process counts, not the host's cores."""
    one = {min(os.sched_getaffinity(0))}
    saw, said = given_to(tmp_path, "--workers", 2, cores=one)
    assert saw == [["1", "2", "1", "", None]] * 2  # messages do not wait for steps
    assert said == "tfbm-launch: 2 workers on 1 core, 1 thread each\n"
    saw, said = given_to(tmp_path, "--workers", 1, cores=one)
    assert saw == [[None, None, None, "", None]]
    assert said == ""


def test_what_the_user_has_set_wins(tmp_path):
    env = {"OMP_NUM_THREADS": "7", shares.THREADS[0]: "3"}
    saw, said = given_to(tmp_path, "--workers", 2, "--threads-per-worker", 5, env=env)
    assert saw == [["3", "5", "7", "", None]] * 2
    assert "5 threads each (as you set: TF_NUM_INTRAOP_THREADS=3, OMP_NUM_THREADS=7)" in said


def test_nothing_is_shared_out_where_something_else_starts_the_workers(tmp_path):
    """TF_CONFIG and --hosts; Slurm is alike, and a host by itself has the whole machine."""
    config = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}
    for options, env in (
        ([], {"TF_CONFIG": json.dumps(config), shares.VISIBLE: "0,1"}),
        (["--hosts", "a:1,b:2", "--index", 1], {shares.VISIBLE: "0,1"}),
    ):
        saw, said = given_to(tmp_path, *options, env=env)
        assert saw == [[None, None, None, "0,1", None]]
        assert said == ""
    options = ["--hosts", "a:1,b:2", "--index", 1, "--threads-per-worker", 3]
    saw, said = given_to(tmp_path, *options, "--gpus-per-worker", 1, env={shares.VISIBLE: "4,5"})
    assert saw == [["3", "3", "3", "4", "true"]]


@pytest.mark.parametrize(
    ("options", "visible", "each", "said"),
    [
        (["--workers", 2], "4,5,6,7", ["4,5", "6,7"], "; GPUs 4,5 | 6,7\n"),
        (["--workers", 2], "GPU-a, GPU-b", ["GPU-a", "GPU-b"], "; GPUs GPU-a | GPU-b\n"),
        (["--workers", 2], "3,1,2", ["3", "1"], "; GPUs 3 | 1 (1 GPU left over)\n"),
        (["--workers", 2, "--gpus-per-worker", 1], "0,1,2,3", ["0", "1"], "(2 GPUs left over)"),
        (["--workers", 2, "--gpus-per-worker", 0], "0,1,2,3", ["-1", "-1"], "; no GPUs\n"),
        (["--workers", 2], "0,1,-1,2", ["0", "1"], "; GPUs 0 | 1\n"),
        (["--workers", 2], "", ["", ""], "each\n"),
        (["--workers", 2], "-1", ["-1", "-1"], "each\n"),
        (["--elastic", "1:2", "--workers", "1"], "0,1", ["0,1"], ""),
    ],
)
def test_gpus_are_split_in_order(tmp_path, options, visible, each, said):
    saw, printed = given_to(tmp_path, *options, env={shares.VISIBLE: visible})
    if options[0] == "--elastic":  # one worker has all there is, as it would anyway
        assert [worker[3:] for worker in saw] == [["0,1", None]]
        return
    grows = "true" if each[0] not in ("", "-1") else None
    assert [worker[3:] for worker in saw] == [[own, grows] for own in each]
    assert said in printed


LISTED = "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})\n" for i in range(4))
INSTANCES = (
    "GPU 0: NVIDIA H100 (UUID: GPU-0)\n"
    "  MIG 3g.40gb     Device  0: (UUID: MIG-a)\n  MIG 3g.40gb     Device  1: (UUID: MIG-b)\n"
)


@pytest.mark.parametrize(
    ("listed", "status", "each"),
    [
        (LISTED, 0, ["0,1", "2,3"]),
        (INSTANCES, 0, ["MIG-a", "MIG-b"]),
        ("NVIDIA-SMI has failed\n", 9, [None, None]),
        ("", 0, [None, None]),
    ],
)
def test_gpus_are_found(tmp_path, listed, status, each):
    """By nvidia-smi, where CUDA_VISIBLE_DEVICES is not set; this one is a fake."""
    (tmp_path / "listed").write_text(listed)
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat {tmp_path / "listed"}; exit {status}\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = write(tmp_path, "print(os.environ.get('CUDA_VISIBLE_DEVICES'))")
    code = f"unset CUDA_VISIBLE_DEVICES; exec {' '.join(COMMAND)} --workers 2 {script}"
    done = run(command=["bash", "-c", code], env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"[worker {i}] {own}" for i, own in enumerate(each)
    ]


def test_too_few_gpus(tmp_path):
    script = write(tmp_path, "")
    for options, each in ((["--workers", 3], 1), (["--workers", 2, "--gpus-per-worker", 2], 2)):
        done = run(*options, script, env={shares.VISIBLE: "6,7"})
        assert done.returncode == 2
        assert f"with {each} GPU" in done.stderr
        assert "Received: 2 GPUs (6,7), CUDA_VISIBLE_DEVICES=6,7." in done.stderr
        assert f"--workers {2 // each}, or train on the cores: --gpus-per-worker 0." in done.stderr


def test_a_containers_quota_counts(monkeypatch):
    """Half a core more than one, of whatever the affinity allows."""
    files = {"/proc/self/cgroup": "0::/pod/job\n", "/sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
             "/sys/fs/cgroup/pod/job/cpu.max": "max 100000\n"}  # fmt: skip
    monkeypatch.setattr(shares, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert shares.cores() == 2
    files["/sys/fs/cgroup/pod/cpu.max"] = "max 100000\n"
    assert shares.cores() == 8
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1\n"  # the first version of cgroups: none
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000\n"
    assert shares.cores() == 8
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "300000\n"
    assert shares.cores() == 3
