"""How fast training in blocks is, over real links, beside what one would use instead.

    make bench          # all K, loopback, 10 and 1 Gbit/s and 100 Mbit/s
    make bench-quick    # K of 8 and 32 on loopback and 1 Gbit/s, some minutes

Two workers, one processor core each, train the same MLP (19 MB of float32 weights, batches of
32 a worker). A link is a pair of network namespaces with `tc tbf` between them (needs root;
skipped with the reason otherwise). All contenders of ours take turns in the same two processes;
the peers in `benchmarks/peers` run right after, on the same link and cores. Writes
`runs/bench/speed.csv`, a table and a plot.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/bench")
BATCH, WIDTHS = 32, (784, 1536, 1536, 768, 10)
NO_SYNC = 10**9  # a block that never ends
PEERS = ("tf_keras_sync",)
DEVICE = "tfbm0"  # a worker's end of the link, in its namespace


# -- a link between two workers -------------------------------------------------------------------


@contextlib.contextmanager
def link(rate, workers):
    """Yields (command prefix, address) for each worker; `rate` as tc writes it, or None."""
    if rate is None:
        yield [([], "127.0.0.1")] * workers
        return
    names = [f"tfbm{os.getpid()}-{i}" for i in range(workers)]
    bridge = f"{names[0]}-b"
    try:
        run("ip", "netns", "add", bridge)
        inside(bridge, "ip link add name bridge0 type bridge")
        inside(bridge, "ip link set bridge0 up")
        for i, name in enumerate(names):
            run("ip", "netns", "add", name)
            inside(name, f"ip link add name {DEVICE} type veth peer name port{i} netns {bridge}")
            inside(bridge, f"ip link set port{i} master bridge0 up")
            inside(name, f"ip addr add 10.77.0.{i + 1}/24 dev {DEVICE}")
            inside(name, f"ip link set {DEVICE} up")
            inside(name, "ip link set lo up")
            inside(name, f"tc qdisc add dev {DEVICE} root tbf rate {rate} burst 1mb latency 50ms")
        yield [(["ip", "netns", "exec", n], f"10.77.0.{i + 1}") for i, n in enumerate(names)]
    finally:
        for name in (*names, bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def inside(name, command):
    run("ip", "netns", "exec", name, *command.split())


def launch(places, script, arguments, limit):
    """Runs a script on one worker per place, each on a core of its own, with TF_CONFIG set.
    Returns the JSON lines that worker 0 prints."""
    ports = []
    for _ in places:
        with socket.socket() as s:
            s.bind(("", 0))
            ports.append(s.getsockname()[1])
    addresses = [f"{address}:{port}" for (_, address), port in zip(places, ports, strict=True)]
    processes = []
    cores = sorted(os.sched_getaffinity(0))
    for i, (prefix, _) in enumerate(places):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""}
        environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
        core = str(cores[i % len(cores)])
        command = [*prefix, "taskset", "-c", core, sys.executable, str(script), *arguments]
        pipe = subprocess.DEVNULL if i else subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=pipe, stderr=pipe, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
    try:
        printed, errors = processes[0].communicate(timeout=limit)
        for process in processes[1:]:
            process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        printed, errors = "", f"not done after {limit} s"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if not rows:
        raise OSError((errors.strip().splitlines() or ["no output"])[-1])
    return rows


# -- one worker of ours ------------------------------------------------------------------------


def work(options):
    """Every contender in turn, `rounds` times; worker 0 prints a JSON line for each."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[BATCH, WIDTHS[0]]).astype("float32")
    y = rng.integers(10, size=BATCH)
    data = strategy.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensors((x, y)).repeat()
    )

    def contender(k, overlap=False, sync=False):
        with strategy.scope():
            layers = [keras.layers.Dense(n, activation="relu") for n in WIDTHS[1:-1]]
            model = keras.Sequential(
                [keras.Input([WIDTHS[0]]), *layers, keras.layers.Dense(WIDTHS[-1])]
            )
            inner = keras.optimizers.SGD(0.001)
            optimizer = inner if sync else tfbm.BlockMomentum(
                inner, sync_period=k, block_momentum=0.5, overlap=overlap
            )  # fmt: skip
            model.compile(
                optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=min(k, 32) if k > 64 else k,
            )  # fmt: skip
        clock = Clock()
        callbacks = [clock] if sync else [tfbm.BlockTraining(options.jit), clock]
        return model, callbacks, clock

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

    contenders = {("no communication", 0): contender(NO_SYNC)}
    contenders["synchronous fit", 1] = contender(1, sync=True)
    for k in options.periods:
        contenders["blocks", k] = contender(k)
        if k > 1:
            contenders["blocks, overlap", k] = contender(k, overlap=True)
    # At least five blocks; of each, what one execution takes.
    executions = {key: max(6, 64 // (key[1] or 32)) for key in contenders}
    executions["synchronous fit", 1] = 24
    results: dict = {key: [] for key in contenders}
    bare, wire = [], {}
    for n in range(options.rounds + 1):  # the first one compiles
        for key, (model, callbacks, clock) in contenders.items():
            sent, blocks = bytes_sent(), blocks_of(model)
            each = model.steps_per_execution
            model.fit(data, steps_per_epoch=executions[key] * each, verbose=0, callbacks=callbacks)
            if n:
                # The last block also lands what is in flight: the end of an epoch.
                spans = [b - a for a, b in itertools.pairwise(clock.ends[:-1])]
                results[key].append(statistics.median(spans) / each)
                if blocks_of(model) > blocks:
                    wire[key] = (bytes_sent() - sent) / (blocks_of(model) - blocks)
            if n and key == ("no communication", 0):
                bare.append(all_reduce_seconds(strategy, model))
    if strategy.cluster_resolver.task_id:
        return
    size = sum(w.nbytes for w in contenders["no communication", 0][0].get_weights())
    rows = [
        {"method": method, "k": k, "step_seconds": statistics.median(seconds),
         "wire_bytes": wire.get((method, k))}
        for (method, k), seconds in results.items()
    ]  # fmt: skip
    rows.append({"method": "all_reduce alone", "k": 0, "step_seconds": statistics.median(bare)})
    for row in rows:
        print(json.dumps({**row, "family": "ours", "model_bytes": size}), flush=True)


def all_reduce_seconds(strategy, model):
    """The median of a few bare all-reduces of as many bytes as a boundary has."""
    import tensorflow as tf

    from tf_blockmomentum.strategy import sum_packs

    flat = tf.zeros([sum(w.size for w in model.get_weights())])

    @tf.function
    def reduce():
        return strategy.run(lambda: tf.reduce_sum(sum_packs([tf.identity(flat)])[0]))

    seconds = []
    for n in range(5):
        began = time.perf_counter()
        strategy.experimental_local_results(reduce())[0].numpy()
        if n:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def blocks_of(model):
    return getattr(model.optimizer, "blocks", 0)


def bytes_sent():
    """By this worker: what its network interface has counted (on loopback, by all)."""
    device = DEVICE if Path("/sys/class/net", DEVICE).exists() else "lo"
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


# -- all of it ------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=["loopback", "10gbit", "1gbit", "100mbit"])
    parser.add_argument("--periods", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jit", action="store_true", help="compile local steps with XLA")
    parser.add_argument("--quick", action="store_true", help="K of 8 and 32, two links")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.links, options.periods, options.rounds = ["loopback", "1gbit"], [8, 32], 3
    if options.worker:
        return work(options)
    rows = []
    for name in options.links:
        rate = None if name == "loopback" else name
        ours = ["--worker", "--rounds", str(options.rounds), "--periods",
                *map(str, options.periods), *["--jit"] * options.jit]  # fmt: skip
        peer = [str(n) for n in (BATCH, options.rounds, *WIDTHS)]
        try:
            with link(rate, 2) as places:
                for script, arguments in (
                    (Path(__file__), ours),
                    *((HERE / "peers" / f"{p}.py", peer) for p in PEERS),
                ):
                    try:
                        found = launch(places, script.resolve(), arguments, limit=900)
                    except OSError as error:
                        print(f"{name}: no {script.stem}: {error}", flush=True)
                        continue
                    rows += [{"link": name, **row} for row in found]
        except OSError as error:
            print(f"{name}: skipped, {error}", flush=True)
    if not rows:
        return 1
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    text = report(rows)
    (RUNS / "speed.md").write_text(text)
    print(text)
    plot(rows, RUNS / "speed.png")
    return 0


def report(rows):
    """Ratios first, per link."""
    lines = []
    for name in dict.fromkeys(row["link"] for row in rows):
        here = {(r["method"], r["k"]): r for r in rows if r["link"] == name}
        alone = here["no communication", 0]["step_seconds"]
        bare = here["all_reduce alone", 0]["step_seconds"]
        titles = ["method", "K", "share of no communication", "examples/s"]
        titles += ["boundary / all_reduce", "bytes sent per boundary / weights"]
        step, whole = f"{1000 * alone:.1f} ms", f"{1000 * bare:.0f} ms"
        lines += [f"{name}: a step {step}, an all_reduce of the weights {whole}", ""]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for (method, k), row in here.items():
            if k == 0 and method != "no communication":
                continue
            seconds = row["step_seconds"]
            boundary = f"{(seconds - alone) * k / bare:.2f}" if method.startswith("bl") else ""
            wire = ""
            if row.get("wire_bytes") and name != "loopback":
                wire = f"{row['wire_bytes'] / row['model_bytes']:.3f}"  # 2 (P - 1) / P is 1
            lines.append(
                f"| {method} | {k or ''} | {alone / seconds:.2f} | {2 * BATCH / seconds:.0f} | "
                f"{boundary} | {wire} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    links = list(dict.fromkeys(row["link"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(links), figsize=(4.5 * len(links), 4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, name in zip(axes[0], links, strict=True):
        here = [row for row in rows if row["link"] == name]
        (alone,) = [r["step_seconds"] for r in here if r["method"] == "no communication"]
        for method in dict.fromkeys(r["method"] for r in here if r["k"]):
            points = [(r["k"], alone / r["step_seconds"]) for r in here if r["method"] == method]
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.05)
        axis.set_title(name)
        axis.set_xlabel("sync_period (K)")
    axes[0, 0].set_ylabel("share of the speed without communication")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
