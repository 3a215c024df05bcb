"""`python -m benchmarks.memory`: the memory of a large batch is that of one micro-batch.

One rank trains the same 32,768 random images in steps of 256 and in a single step of 32,768, both in passes of 128
images, each in a process of its own; and, to show that the number can move, in passes of 512. What is recorded is the
highest resident memory of the process, and how much of it came after everything was imported and the training began.
"""

import argparse
import resource
import subprocess
import sys
import tempfile

from benchmarks import record, show

IMAGES = 32_768
CASES = {  # name -> (batch, images per pass)
    "256 in passes of 128": (256, 128),
    "32,768 in passes of 128": (32_768, 128),
    "32,768 in passes of 512": (32_768, 512),
}


def main() -> None:
    """Run every case `--rounds` times in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, type=int, metavar=("BATCH", "MICRO"), help="one run in this process")
    args = parser.parse_args()
    if args.one:
        print("MEMORY", *train(*args.one))
        return
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, case in CASES.items():
            found[name].append(in_a_fresh_process(*case))
            print(
                f"{name}: peak {found[name][-1][0]:.0f} MiB, {found[name][-1][1]:.0f} MiB of it for training",
                flush=True,
            )
    rows = table(found)
    print(show.markdown(rows))
    peaks = {name: [peak for peak, _ in pairs] for name, pairs in found.items()}
    print(record.write("memory", rows, {}, unit="MiB", raw_mib=peaks, model="cnn_small", image_size=64, images=IMAGES))


def in_a_fresh_process(batch: int, micro: int) -> tuple[float, float]:
    """(peak, of it for training) in MiB."""
    words = [sys.executable, "-m", "benchmarks.memory", "--one", str(batch), str(micro)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True)
    _, peak, own = done.stdout.strip().splitlines()[-1].split()
    return float(peak), float(own)


def train(batch: int, micro: int) -> tuple[float, float]:
    """One epoch in this process."""
    from dist_lars import api
    from dist_lars.cli import load_config

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data.kind": "synthetic", "data.image_size": 64, "data.resize": 64, "data.train_images": IMAGES,
            "data.val_images": 64, "data.classes": 10, "data.workers": 0, "model.name": "cnn_small",
            "batch_size": batch, "micro_batch": micro, "epochs": 1, "schedule.warmup_epochs": 0, "run_dir": folder,
            "log.tensorboard": False, "log.progress": False,
        }  # fmt: skip
        config = load_config(overrides=options)
        before = peak()
        api.train(config)
    return peak(), peak() - before


def peak() -> float:
    """The highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def table(found: dict[str, list[tuple[float, float]]]) -> list[dict[str, float | str]]:
    """One row per case, and its ratio to the first."""
    rows: list[dict[str, float | str]] = []
    base = record.summary([p for p, _ in next(iter(found.values()))])["median"]
    own_base = record.summary([o for _, o in next(iter(found.values()))])["median"]
    for name, pairs in found.items():
        whole = record.summary([p for p, _ in pairs])["median"]
        own = record.summary([o for _, o in pairs])["median"]
        row = {"batch": name, "peak MiB": whole, "ratio": whole / base}
        rows.append(row | {"for training MiB": own, "training ratio": own / own_base})
    return rows


if __name__ == "__main__":
    main()
