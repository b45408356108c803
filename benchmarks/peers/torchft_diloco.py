"""torchft's DiLoCo over gloo: fault-tolerant local steps with an outer optimizer, and with its
`fragment_sync_delay` so that the all-reduce runs under the next steps. Arguments and output are
those of torch_gloo.py."""

import datetime
import itertools
import json
import logging
import os
import statistics
import sys
import time

import torch
from torch import distributed, nn
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

logging.disable(logging.WARNING)
batch, rounds, periods, *widths = sys.argv[1:]
batch, rounds, widths = int(batch), int(rounds), [int(n) for n in widths]
config = json.loads(os.environ["TF_CONFIG"])
addresses, rank = config["cluster"]["worker"], config["task"]["index"]
host, own = addresses[0].split(":"), addresses[rank].split(":")
os.environ["GLOO_SOCKET_IFNAME"] = "tfbm0" if os.path.exists("/sys/class/net/tfbm0") else "lo"
torch.set_num_threads(1)
lighthouses = []  # one a contender: a quorum has more than half of the replicas of one
store = distributed.TCPStore(own[0], 0, is_master=True, wait_for_workers=False)
torch.manual_seed(0)
x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], [batch])


class Contender:
    """A model, its manager and DiLoCo around its optimizer."""

    def __init__(self, k, delay):
        layers = []
        for a, b in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.001)
        self.diloco = None
        if k:
            port = int(host[1]) + len(lighthouses)
            lighthouses.append(
                LighthouseServer(bind=f"0.0.0.0:{port}", min_replicas=len(addresses))
                if rank == 0
                else None
            )
            timeout = datetime.timedelta(seconds=120)
            manager = Manager(
                pg=ProcessGroupGloo(timeout),
                load_state_dict=self.model.load_state_dict,
                state_dict=self.model.state_dict,
                min_replica_size=len(addresses),
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=timeout,
                rank=0,
                world_size=1,
                store_addr=own[0],
                store_port=store.port,
                lighthouse_addr=f"http://{host[0]}:{port}",
                hostname=own[0],
                replica_id=f"{rank}-{k}-{delay}",
                init_sync=False,
            )
            outer = torch.optim.SGD(self.model.parameters(), 1.0, momentum=0.5)
            self.diloco = DiLoCo(
                manager, [self.model], self.optimizer, outer, k, fragment_sync_delay=delay
            )

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()


contenders = {("no communication", 0): Contender(0, 0)}
for k in map(int, periods.split(",")):
    if k > 1:
        contenders["DiLoCo", k] = Contender(k, 0)
        contenders["DiLoCo, overlap", k] = Contender(k, k - 1)
results = {key: [] for key in contenders}
for n in range(rounds + 1):  # the first one warms up
    for (method, k), contender in contenders.items():
        if contender.diloco is not None and n == 0:
            contender.diloco.__enter__()
        contender.run(k)  # both workers have ended a block
        steps = max(3 * k, 64)
        began = time.perf_counter()
        contender.run(steps)
        if n:
            results[method, k].append((time.perf_counter() - began) / steps)
if rank == 0:
    for (method, k), seconds in results.items():
        row = {"method": method, "k": k, "family": "torchft"}
        print(json.dumps({**row, "step_seconds": statistics.median(seconds)}), flush=True)
    time.sleep(2)  # the lighthouses go last
os._exit(0)  # its servers' threads would not end
