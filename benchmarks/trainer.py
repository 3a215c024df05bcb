"""`python -m benchmarks.trainer`: images/s of the whole trainer, against its own bare loop and a peer.

    python -m benchmarks.trainer --peer pytorch_imagenet_resnet50.py

What is compared, all in one run and in turn, ResNet-18 at 224 px, one compute thread per rank:

- ours with its defaults, in float32 with contiguous weights, and with `comm.deterministic`, on real JPEG files;
- the peer: Horovod's own ImageNet example (github.com/horovod/horovod, examples/pytorch/pytorch_imagenet_resnet50.py),
  with ResNet-18 for ResNet-50 and one thread for four, and a clock around its `train(epoch)`;
- ours on synthetic images, and the bare loop that it can at best be: forward, backward, LARS step on one fixed batch.

The JPEG files are those of $DIST_LARS_SAMPLES/imagenet_sample.tar (flat, named nWNID_name.JPEG).
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record, show
from benchmarks.group import environment, start_words
from dist_lars import runlog

BATCH = 32  # images per rank and step
WARMUP = 6  # steps
COPIES = 1  # of the sample, so that an epoch has enough steps
PEER_CHANGES = {
    "models.resnet50()": "models.resnet18()",
    "torch.set_num_threads(4)": "torch.set_num_threads(1)",
    "        train(epoch)\n        validate(epoch)\n        save_checkpoint(epoch)": (
        "        import time\n        began = time.perf_counter()\n        train(epoch)\n"
        "        if hvd.rank() == 0:\n"
        "            print('SECONDS', time.perf_counter() - began, len(train_loader) * args.batch_size * hvd.size())"
    ),
}

AGAINST = {
    "ours, defaults": "Horovod's example",
    "ours, fp32 contiguous": "Horovod's example",
    "ours, deterministic": "ours, defaults",
    "ours, synthetic": "bare loop, synthetic",
    "bare loop, our reducer, channels-last": "bare loop, Horovod's wrapper, contiguous",
    "bare loop, our reducer, contiguous": "bare loop, Horovod's wrapper, contiguous",
}


def main() -> None:
    """Run every candidate `--rounds` times in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Horovod's pytorch_imagenet_resnet50.py; without it no peer is run")
    parser.add_argument(
        "--samples", type=Path, default=os.environ.get("DIST_LARS_SAMPLES"), help="default: $DIST_LARS_SAMPLES"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14, help=f"timed steps of a run, after {WARMUP} for warm-up")
    parser.add_argument("--name", default="trainer", help="of the record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = unpack(args.samples, folder) if args.samples else None
        candidates = list_candidates(folder, images, args.peer, args.steps)
        speeds: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(args.rounds):
            for name, run in candidates.items():
                speeds[name].append(run())
                print(f"round {turn + 1}: {name}: {speeds[name][-1]:.1f} images/s", flush=True)
            rows, facts = table(speeds), {"unit": "images/s of all ranks", "batch_per_rank": BATCH, "model": "resnet18"}
            record.write(args.name, rows, {}, **facts, raw_images_per_s=speeds)  # each round, lest a long run be lost
    print(show.markdown(rows))


def unpack(samples: Path, folder: Path) -> Path:
    """The sample as an image folder, each file under COPIES names in train/CLASS/ and under one in val/CLASS/."""
    root = folder / "images"
    with tarfile.open(Path(samples) / "imagenet_sample.tar") as archive:
        archive.extractall(folder / "flat", filter="data")
    for file in sorted((folder / "flat").rglob("*.JPEG")):
        name = file.name.partition("_")[0]
        for split, copies in (("train", COPIES), ("val", 1)):
            target = root / split / name
            target.mkdir(parents=True, exist_ok=True)
            for i in range(copies):
                (target / f"{i}.JPEG").symlink_to(file)
    return root


def list_candidates(folder: Path, images: Path | None, peer: Path | None, steps: int) -> dict[str, Any]:
    """{name: function that runs it once and returns images/s}."""
    plain = ["--precision", "fp32", "--model.channels_last", "false"]
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        if images:
            real = ["--data.path", str(images)]
            found[f"ours, defaults, {ranks}"] = lambda n=ranks, d=real: ours(folder, n, d, steps)
            found[f"ours, fp32 contiguous, {ranks}"] = lambda n=ranks, d=real: ours(folder, n, [*d, *plain], steps)
        if images and peer:
            found[f"Horovod's example, {ranks}"] = lambda n=ranks: run_peer(folder, peer, images, n)
    if images:
        found["ours, deterministic, 2"] = lambda: ours(folder, 2, [*real, "--comm.deterministic", "true"], steps)
    fake = ["--data.kind", "synthetic"]
    found["ours, synthetic, 1"] = lambda: ours(folder, 1, fake, steps)
    found["bare loop, synthetic, 1"] = lambda: bare(folder, 1, steps, "none", "true")
    found["bare loop, our reducer, channels-last, 2"] = lambda: bare(folder, 2, steps, "reducer", "true")
    found["bare loop, our reducer, contiguous, 2"] = lambda: bare(folder, 2, steps, "reducer", "false")
    found["bare loop, Horovod's wrapper, contiguous, 2"] = lambda: bare(folder, 2, steps, "wrapper", "false")
    return found


def launch(ranks: int, words: list[str], cwd: Path) -> str:
    """Run `words` on so many ranks with one thread each; the output."""
    done = subprocess.run(
        [*start_words("horovodrun", ranks), *words], cwd=cwd, env=environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def ours(folder: Path, ranks: int, options: list[str], steps: int) -> float:
    """Images/s of `dist_lars.train` after WARMUP steps, from its run log."""
    batch = BATCH * ranks
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    size = {"train_images": batch * (WARMUP + steps), "val_images": batch, "classes": 320}
    per_epoch = 320 * COPIES // batch if "--data.path" in options else WARMUP + steps
    epochs = -(-(WARMUP + steps) // per_epoch)
    words = [
        sys.executable, "-m", "dist_lars.train", "--config", str(write_config(folder)), "--run_dir", str(run_dir),
        "--batch_size", str(batch), "--micro_batch", str(BATCH), "--epochs", str(epochs),
        "--log.eval_epochs", "1000", "--resume.save_epochs", "1000", "--log.every_steps", "2",
        "--log.tensorboard", "false", *[w for k, v in size.items() for w in (f"--data.{k}", str(v))], *options,
    ]  # fmt: skip
    launch(ranks, words, folder)
    lines = [line for line in runlog.read(run_dir, "train") if line["step"] > WARMUP]
    return sum(line["count"] for line in lines) / sum(line["count"] / line["images_per_s"] for line in lines)


def write_config(folder: Path) -> Path:
    """The options that all our runs share."""
    file = folder / "trainer.yaml"
    file.write_text("name: benchmark\nschedule: {warmup_epochs: 0}\noptim: {law: default, lr: 0.1}\nresume.keep: 1\n")
    return file


def run_peer(folder: Path, example: Path, images: Path, ranks: int) -> float:
    """Images/s of the peer over its second epoch."""
    text = example.read_text()
    for old, new in PEER_CHANGES.items():
        if old not in text:
            raise SystemExit(f"{example} is not the example that this benchmark knows: it lacks {old!r}")
        text = text.replace(old, new)
    script = folder / "peer.py"
    script.write_text(text)
    words = [
        sys.executable, str(script), "--train-dir", str(images / "train"), "--val-dir", str(images / "val"),
        "--epochs", "2", "--batch-size", str(BATCH), "--no-cuda", "--log-dir", str(folder / "peer-logs"),
    ]  # fmt: skip
    lines = [
        line.split("SECONDS")[1].split() for line in launch(ranks, words, folder).splitlines() if "SECONDS" in line
    ]
    return float(lines[-1][1]) / float(lines[-1][0])


def bare(folder: Path, ranks: int, steps: int, averaging: str, channels_last: str) -> float:
    """Images/s of the bare loop, see `benchmarks.trainer_bare`."""
    words = [sys.executable, "-m", "benchmarks.trainer_bare", str(BATCH), str(steps), averaging, channels_last]
    return float(launch(ranks, words, folder).split("SPEED")[1].split()[0])


def table(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per candidate: images/s, and its ratio to what it is held against, round by round."""
    rows = []
    for name, values in speeds.items():
        what, _, ranks = name.rpartition(", ")
        row: dict[str, Any] = {"what": what, "ranks": int(ranks), "images/s": record.summary(values)["median"]}
        base = speeds.get(f"{AGAINST.get(what)}, {ranks}")
        if base:
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            middle = record.summary(ratios)["median"]
            row |= {"against": AGAINST[what], "ratio": middle, "lowest": min(ratios), "highest": max(ratios)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
