"""The ranks of `benchmarks.loader`: how long each needs until it knows a million images, and how much memory."""

import json
import pickle
import sys
import time
from multiprocessing.reduction import ForkingPickler

from benchmarks import record
from dist_lars import comm as ranks
from dist_lars import data, inputs


def main() -> None:
    """WHAT FOLDER CACHE: rank 0 prints seconds (the slowest rank's), MB per rank (the largest), MB sent to a worker."""
    what, folder, cache = sys.argv[1:]
    comm = ranks.start(cpu=True)
    from torchvision.datasets import ImageFolder  # before memory is measured

    comm.sum({"warm": 1.0})
    comm.barrier()
    before, began = resident(), time.perf_counter()
    if what == "torchvision":
        found = ImageFolder(folder)
    else:
        found = inputs.share_indexes(comm, lambda: [data.index_folder(folder, cache or None)])[0]
    seconds, memory = time.perf_counter() - began, resident() - before
    sent = len(pickle.dumps(found)) if what == "torchvision" else len(ForkingPickler.dumps(found))
    assert len(found) > 0
    rows = comm.gather((seconds, memory, len(found)), "rows")
    if comm.rank == 0:
        worst = [max(row[i] for row in rows) for i in range(3)]
        print("RESULT", json.dumps({"seconds": worst[0], "mb": worst[1], "images": worst[2], "worker_mb": sent / 1e6}))
    comm.barrier()
    comm.close()


def resident() -> float:
    """MB of memory that this process holds, shared memory included."""
    return record.own_memory("VmRSS") / 1024e3


if __name__ == "__main__":
    main()
