"""PyTorch over gloo: DistributedDataParallel, and local SGD as its PeriodicModelAverager does it.
Prints JSON lines as speed.py's own workers do. Arguments: batch, rounds, all K, layer widths."""

import itertools
import json
import os
import statistics
import sys
import time

import torch
from torch import distributed, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

batch, rounds, periods, *widths = sys.argv[1:]
batch, rounds, widths = int(batch), int(rounds), [int(n) for n in widths]
config = json.loads(os.environ["TF_CONFIG"])
addresses, rank = config["cluster"]["worker"], config["task"]["index"]
os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = addresses[0].split(":")
os.environ["GLOO_SOCKET_IFNAME"] = "tfbm0" if os.path.exists("/sys/class/net/tfbm0") else "lo"
torch.set_num_threads(1)
distributed.init_process_group("gloo", rank=rank, world_size=len(addresses))
torch.manual_seed(rank)
x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], [batch])


def network():
    layers = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Contender:
    """A model, and what is done to it in each step."""

    def __init__(self, k=0):
        self.model = network()
        if k == 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.averager = PeriodicModelAverager(period=k, warmup_steps=0) if k > 1 else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.001)

    def step(self):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        if self.averager is not None:
            self.averager.average_parameters(self.model.parameters())


contenders = {("no communication", 0): Contender(), ("DistributedDataParallel", 1): Contender(1)}
for k in map(int, periods.split(",")):
    if k > 1:
        contenders["PeriodicModelAverager", k] = Contender(k)
results = {key: [] for key in contenders}
for n in range(rounds + 1):  # the first one warms up
    for (method, k), contender in contenders.items():
        distributed.barrier()
        steps = 24 if k == 1 else max(3 * k, 64)
        began = time.perf_counter()
        for _ in range(steps):
            contender.step()
        if n:
            results[method, k].append((time.perf_counter() - began) / steps)
distributed.barrier()
if rank == 0:
    for (method, k), seconds in results.items():
        row = {"method": method, "k": k, "family": "PyTorch"}
        print(json.dumps({**row, "step_seconds": statistics.median(seconds)}), flush=True)
distributed.destroy_process_group()
