"""Seconds of one all-reduce of 10 MB, the median of several: printed by rank 0."""

import statistics
import time

import horovod.torch as hvd
import torch

hvd.init()
values = torch.ones(2_500_000)
seconds = []
for _ in range(5):
    hvd.barrier()
    began = time.monotonic()
    hvd.allreduce_(values, name="values", op=hvd.Average)
    seconds.append(time.monotonic() - began)
assert torch.equal(values, torch.ones_like(values))
if hvd.rank() == 0:
    print(f"SECONDS {statistics.median(seconds[1:])}", flush=True)
hvd.shutdown()
