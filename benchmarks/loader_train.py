"""The ranks of `benchmarks.loader`: ResNet-18 training, in turn from random images, shards and JPEG files.

One model on each rank takes blocks of steps from each source in turn, so that all sources see the same machine.
"""

import json
import sys
import time
from collections.abc import Iterator
from itertools import count

import torch

from dist_lars import api, data, engine, inputs
from dist_lars.cli import load_config
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from dist_lars.resources import cores_per_rank, pick_autocast, pick_device, use_cores
from dist_lars.schedule import lr_at

MICRO, STEPS = 32, 4  # images per rank and step, steps per block


def main() -> None:
    """FOLDER PACKED ROUNDS: rank 0 prints {source: images/s of each block}."""
    folder, packed, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sources = {
        "synthetic": {"data.kind": "synthetic"},
        "shards of 256 px": {"data.path": packed},
        "folder": {"data.path": folder},
    }
    comm = api.start_ranks(config_of(sources["synthetic"], 1, 1))
    cores = cores_per_rank(comm)
    device = pick_device("auto", comm.local_rank)
    workers, threads = use_cores(cores, device, None)
    classes = len(inputs.open_sets(config_of(sources["folder"], comm.size, 1), comm).classes)
    configs = {name: config_of(options, comm.size, classes) for name, options in sources.items()}
    streams = {}
    for name, config in configs.items():
        sets = inputs.open_sets(config, comm)
        order = data.TrainOrder(len(sets.train), 0, comm.rank, comm.size, MICRO * comm.size, MICRO, 0, 10**9)
        streams[name] = iter(data.batches(sets.train, order, workers, pin=False))
    config = configs["folder"]
    plan = make_plan(config, comm.size, 100 * MICRO * comm.size, 1)
    torch.manual_seed(0)
    job = api.make_job(config, comm, plan, classes, device, pick_autocast("auto", device))
    job.model.train()
    result = measure(job, streams, rounds)
    if comm.rank == 0:
        print("RESULT", json.dumps({"speeds": result, "workers": workers, "threads": threads}), flush=True)
    comm.close()


def config_of(options: dict, ranks: int, classes: int) -> object:
    """The options of every source."""
    shared = {"batch_size": MICRO * ranks, "micro_batch": MICRO, "epochs": 10, "optim.lr": 0.1, "data.classes": classes}
    return load_config(overrides={**shared, "schedule.warmup_epochs": 0.0, **options})


def measure(job: engine.Job, streams: dict[str, Iterator], rounds: int) -> dict[str, list[float]]:
    """Images/s of all ranks, by source, one number per block; the first round warms up."""
    counts, clock, speeds = Counts(job.device), engine.Clock(), {name: [] for name in streams}
    steps = count()
    for turn in range(rounds + 1):
        for name, stream in streams.items():
            job.comm.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                step = next(steps) % 1000
                engine.set_lr(job.optimizer, lr_at(step, job.plan.rate))
                engine.train_step(job, stream, step, counts, clock)
            job.comm.barrier()
            if turn:
                speeds[name].append(STEPS * MICRO * job.comm.size / (time.perf_counter() - began))
    return speeds


if __name__ == "__main__":
    main()
