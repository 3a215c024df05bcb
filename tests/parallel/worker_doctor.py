"""One rank of `doctor --cluster` on a made-up node: argv is FAULT,... RANK RUN_DIR, the faults of rank RANK alone."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from dist_lars import doctor_cluster
from dist_lars.cli import load_config
from dist_lars.doctor_roll import IMPORTING, Deadline, Roll

faults, sick, folder = sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3])
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
mine = rank == sick
LIMIT = 5.0  # seconds until a hang is named, from the moment on that all have joined: that alone may take a minute


def change(facts):
    """Each rank its own node, and the sick one's fault."""
    facts = dataclasses.replace(facts, host=f"node{rank}")
    if "stop" in faults:
        Deadline(roll, LIMIT).watch.start()
    if mine and "version" in faults:
        return dataclasses.replace(facts, versions={**facts.versions, "torch": "1.0"})
    if mine and "raise" in faults:
        raise OSError("this disk is gone")
    if mine and "stop" in faults:
        os.kill(os.getpid(), signal.SIGSTOP)
    return facts


def clock():
    """Seconds since the epoch, as this node thinks."""
    return time.time() + 90 * (mine and "clock" in faults)


def slow_import(roll):
    """Where the environment comes slowly from a file system: the other rank is already waiting."""
    while 1 - rank not in roll.call() or roll.call()[1 - rank].stage == IMPORTING:
        time.sleep(0.1)
    Deadline(roll, LIMIT).watch.start()
    time.sleep(10 * LIMIT)


if mine and "import" in faults:
    doctor_cluster.check_alone = slow_import
config = load_config(
    "quickstart",
    overrides={"run_dir": str(folder), "device": "cpu"}
    | ({"data.kind": "folder", "data.stage": "/proc/none"} if "stage" in faults else {}),
)
if mine and "shared" in faults:  # a run directory that this node has for itself
    folder = folder.with_name("elsewhere")
roll = Roll(folder, rank)
if "import" in faults and not mine:
    Deadline(roll, 30 * LIMIT).watch.start()  # it answers when the other one's time is up
sys.exit(doctor_cluster.examine(config, roll, clock=clock, change=change))
