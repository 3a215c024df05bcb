"""`dist_lars.train` that also tells who copied shards: a line "HOST BYTES" in $STAGED for each call of `stage`."""

import os
import socket
import sys

from dist_lars import train
from dist_lars.data import stage

copy = stage.stage


def told(folder: str, target: str) -> int:
    size = copy(folder, target)
    with open(os.environ["STAGED"], "a") as file:  # noqa: PTH123 -- appended by several hosts, a line each
        file.write(f"{socket.gethostname()} {size}\n")
    return size


stage.stage = told

if __name__ == "__main__":
    train.main(sys.argv[1:])
