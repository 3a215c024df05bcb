"""Batches: files that are no images, workers that die, images held in memory; never a hang, never another order."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lars.data import (
    TrainOrder,
    ValOrder,
    batches,
    folder_sets,
    hold,
    index_folder,
    list_folders,
    synthetic_sets,
    val_images,
)
from dist_lars.data.cache import Remembered
from dist_lars.data.loader import KEPT
from dist_lars.data.stage import advice
from dist_lars.errors import UserError
from tests.conftest import kept, run_command

OPTIONS = {"seed": 0, "image_size": 16, "resize": 20, "min_scale": 0.5, "flip": True}
ORDER = TrainOrder(24, 0, 0, 1, global_batch=8, micro_batch=4, start=0, stop=9)


@pytest.fixture
def broken(image_folder, tmp_path):
    """The tiny folder with two files of training and one of validation that are no images."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "train" / "class0" / "006.jpg").write_bytes(b"")
    (folder / "train" / "class1" / "010.jpg").write_bytes((folder / "train" / "class1" / "013.jpg").read_bytes()[:500])
    (folder / "val" / "class2" / "005.jpg").write_text("moved permanently")
    return folder


def sets_of(folder, **options):
    return folder_sets(*list_folders(str(folder), None), **OPTIONS, **options)


def everything(made):
    """(pixels, labels) of all batches in one piece each."""
    pairs = kept(made)
    return np.concatenate([p for p, _ in pairs]), np.concatenate([y for _, y in pairs])


def test_a_broken_file_fails_by_name(broken):
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"cannot read image .*(006|010).jpg: .*--data.on_error skip"):
            everything(batches(sets_of(broken).train, ORDER, workers, pin=False))


def test_skipped_files_are_replaced_alike_by_all_ranks_and_workers(broken):
    images = sets_of(broken, skip=True, max_skipped=5).train
    alone = batches(images, ORDER, 0, pin=False)
    pixels, labels = everything(alone)
    assert len(pixels) == 72  # equal steps
    assert {name.split("/")[-1] for name in alone.skipped} == {"006.jpg", "010.jpg"}
    assert "the file is empty" in alone.skipped.values()
    helped = everything(batches(images, ORDER, 2, pin=False))
    assert np.array_equal(pixels, helped[0])
    assert np.array_equal(labels, helped[1])
    for rank in (0, 1):
        mine = TrainOrder(24, 0, rank, 2, global_batch=8, micro_batch=4, start=0, stop=9)
        part = everything(batches(images, mine, 0, pin=False))[0]
        assert np.array_equal(part.reshape(9, 4, -1), pixels.reshape(9, 2, 4, -1)[:, rank])


def test_a_replaced_image_is_another_good_one_with_its_own_label(broken):
    images = sets_of(broken, skip=True, max_skipped=5).train
    bad = [i for i in range(24) if images.index.name(i).endswith(("006.jpg", "010.jpg"))]
    fetch = batches(images, ORDER, 0, pin=False).loader.dataset
    for i in bad:
        batch = fetch.__getitems__([(3, i)])
        found = [j for j in range(24) if j not in bad and np.array_equal(images[3, j][0], batch.pixels[0])]
        assert found
        assert batch.labels[0] == images.index.labels[found[0]]


def test_validation_leaves_broken_files_out(broken):
    made = batches(sets_of(broken, skip=True, max_skipped=5).val, ValOrder(range(11), 4), 0, pin=False)
    pixels, labels = everything(made)
    assert (len(pixels), len(labels), len(made.skipped)) == (10, 10, 1)


def test_a_batch_without_any_image_is_passed_over(broken):
    images = sets_of(broken, skip=True, max_skipped=5).val
    bad = next(i for i in range(11) if images.index.name(i).endswith("class2/005.jpg"))
    assert list(batches(images, ValOrder(range(bad, bad + 1), 4), 0, pin=False)) == []


def test_too_many_broken_files_stop_the_run(broken):
    with pytest.raises(UserError, match=r"2 images could not be read, .*--data.max_skipped 1 allows no more"):
        everything(batches(sets_of(broken, skip=True, max_skipped=1).train, ORDER, 0, pin=False))


def test_a_set_of_rubbish_stops_the_run(tmp_path):
    for i in range(8):
        path = tmp_path / "train" / "a" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"rubbish")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    order = TrainOrder(8, 0, 0, 1, global_batch=4, micro_batch=4, start=0, stop=2)
    with pytest.raises(UserError, match="100 images in turn could not be read"):
        everything(batches(sets_of(tmp_path, skip=True, max_skipped=1000).train, order, 0, pin=False))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGBUS])
def test_a_dead_worker_is_an_error_that_names_its_cause(end):
    images = synthetic_sets(train=10_000, val=1, classes=2, image_size=16, seed=0).train
    order = TrainOrder(10_000, 0, 0, 1, global_batch=4, micro_batch=4, start=0, stop=2500)
    stream = iter(batches(images, order, 1, pin=False))
    next(stream)
    began = time.monotonic()
    (worker,) = stream.gi_frame.f_locals["stream"]._workers
    os.kill(worker.pid, end)
    cause = {signal.SIGKILL: "SIGKILL: .*ran out of memory", signal.SIGBUS: "SIGBUS: .*/dev/shm is full"}[end]
    with pytest.raises(UserError, match=rf"loader worker {worker.pid} was killed by {cause}"):
        for _ in stream:
            pass
    assert time.monotonic() - began < 20


LOCKED = """
import os, signal, threading
from dist_lars.data import TrainOrder, batches, synthetic_sets
from dist_lars.errors import UserError
if __name__ == "__main__":
    images = synthetic_sets(train=10_000, val=1, classes=2, image_size=16, seed=0).train
    stream = iter(batches(images, TrainOrder(10_000, 0, 0, 1, 4, 4, 0, 2500), 2, pin=False))
    next(stream)
    torchs = stream.gi_frame.f_locals["stream"]
    # If there is a lock in it, the worker holds it now and then, and is killed while it does.
    getattr(torchs._workers_done_event, "_cond", threading.Lock()).acquire()
    os.kill(torchs._workers[0].pid, signal.SIGKILL)
    try:
        for _ in stream:
            pass
    except UserError as e:
        print(e)
    del torchs, stream
    print("the end")
"""


def test_a_worker_that_dies_with_a_lock_hangs_nobody(tmp_path):
    (tmp_path / "locked.py").write_text(LOCKED)
    done = run_command([sys.executable, "locked.py"], 60, cwd=tmp_path)
    assert re.search(r"loader worker \d+ was killed by SIGKILL.*\nthe end$", done.stdout.strip(), re.S), done.stdout
    assert done.returncode == 0


PARENT = """
import os, time
from dist_lars.data import TrainOrder, batches, synthetic_sets
if __name__ == "__main__":
    images = synthetic_sets(train=100, val=1, classes=2, image_size=16, seed=0).train
    stream = iter(batches(images, TrainOrder(100, 0, 0, 1, 4, 4, 0, 25), 1, pin=False))
    next(stream)
    print(stream.gi_frame.f_locals["stream"]._workers[0].pid, flush=True)
    time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_rank(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "parent.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while (alive := Path(f"/proc/{worker}").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        os.kill(worker, signal.SIGKILL)  # nor may it outlive this test
    assert not alive


SIGNALLED = """
import os, signal
from dist_lars.data import ValOrder, batches, synthetic_sets
NAMES = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
def to_all():
    for name in NAMES:
        os.killpg(0, name)
if __name__ == "__main__":
    for name in NAMES:
        signal.signal(name, lambda *_: None)
    images = synthetic_sets(train=100, val=1, classes=2, image_size=16, seed=0).train
    first, second = (batches(images, ValOrder(range(100), 4), 1, pin=False) for _ in range(2))
    to_all()
    stream = iter(first)
    next(stream)
    to_all()
    print(1 + sum(1 for _ in stream), sum(1 for _ in second))
"""


def test_a_signal_to_the_whole_group_is_for_the_rank_alone(tmp_path):
    """Open MPI 5 and torchrun send it to all processes of a rank: those that load must go on until it has saved."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    done = run_command([sys.executable, "signalled.py"], 60, cwd=tmp_path)
    assert done.stdout == "25 25\n"  # and no word of a resource tracker that had to be started again


BUSY = """
import time
import numpy as np
from dist_lars.data import ValOrder, batches
class Slow:
    on_error, max_skipped, remember = "fail", 0, False
    def __getitem__(self, key):
        if key[1]:
            time.sleep(1000)
        return np.zeros((2, 2, 3), np.uint8), 0
if __name__ == "__main__":
    stream = iter(batches(Slow(), ValOrder(range(4), 1), 1, pin=False))
    next(stream)
"""


def test_a_busy_worker_does_not_keep_its_rank(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    assert run_command([sys.executable, "busy.py"], 60, cwd=tmp_path).returncode == 0


class Threads:
    """Images whose label is the number of threads that they are made with."""

    on_error, max_skipped, remember = "fail", 0, False

    def __getitem__(self, key):
        return np.zeros((2, 2, 3), np.uint8), torch.get_num_threads()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_made_by_one_thread_and_the_trainer_keeps_its_own(workers):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set(everything(batches(Threads(), ValOrder(range(4), 2), workers, pin=False))[1].tolist()) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_an_index_is_shared_and_survives_the_way_to_a_worker(image_folder):
    index = list_folders(str(image_folder), None)[0]
    shared = index.shared()
    again = pickle.loads(pickle.dumps(index))
    for other in (shared, again):
        assert [other.path(i) for i in range(24)] == [index.path(i) for i in range(24)]
        assert np.array_equal(other.labels, index.labels)
    assert all(t.is_shared() for t in shared.__dict__["_tensors"].values())


@pytest.mark.parametrize("what", ["bytes", "decoded"])
def test_images_in_memory_are_the_same_images(image_folder, broken, what):
    index = list_folders(str(broken), None)[0]
    held = hold(index, what, threads=2, limit=1e9)
    for i in (0, 4, 23):
        images = sets_of(broken, held=held).train
        difference = images[1, i][0].astype(int) - sets_of(image_folder).train[1, i][0]
        assert np.abs(difference).mean() <= (0 if what == "bytes" else 12)  # decoded: without the DCT's own shrinking
    assert held.bad == {} if what == "bytes" else len(held.bad) == 2
    skipped = batches(sets_of(broken, held=held, skip=True, max_skipped=5).train, ORDER, 0, pin=False)
    everything(skipped)
    assert {name.split("/")[-1] for name in skipped.skipped} == {"006.jpg", "010.jpg"}


def test_a_set_too_large_for_memory_is_refused_with_numbers(image_folder):
    index = list_folders(str(image_folder), None)[0]
    with pytest.raises(
        UserError, match=r"data.cache decoded: 24 images need about .* GB .*use --data.cache none or bytes"
    ):
        hold(index, "decoded", threads=1, limit=50_000)


def test_validation_is_remembered_exactly(image_folder):
    index = index_folder(str(image_folder / "val"))
    order = ValOrder(range(11), 4)
    plain = everything(batches(val_images(index, 16, 20), order, 0, pin=False))
    kept = batches(val_images(index, 16, 20, remember=True), order, 0, pin=False)
    assert isinstance(kept, Remembered)
    first, shutil_gone = everything(kept), kept.batches is None
    assert shutil_gone  # nothing is read any more
    for got in (first, everything(kept)):
        assert np.array_equal(got[0], plain[0])
        assert np.array_equal(got[1], plain[1])


def test_a_pass_broken_off_is_not_remembered(image_folder):
    kept = batches(
        val_images(index_folder(str(image_folder / "val")), 16, 20, remember=True), ValOrder(range(11), 4), 0, False
    )
    next(iter(kept))
    assert len(everything(kept)[0]) == 11


class Numbers:
    """Image i is all i."""

    on_error, max_skipped, remember = "fail", 0, False

    def __len__(self):
        return 200

    def __getitem__(self, key):
        return np.full((8, 8, 3), key[1], np.uint8), key[1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_holds_until_the_second_one_after_it(workers):
    """And its memory is used again: without that, the kernel's work for fresh pages costs a quarter of the speed."""
    before, places = None, set()
    for pixels, labels in batches(Numbers(), ValOrder(range(200), 5), workers, pin=False):
        if before is not None:
            assert before[0][:, 0, 0, 0].tolist() == before[1].tolist()
        assert pixels[:, 7, 7, 2].tolist() == labels.tolist()
        before = pixels, labels
        places.add(pixels.data_ptr())
        time.sleep(0.005)  # for workers to run ahead as far as they are allowed to
    assert len(places) == KEPT * max(1, workers)


def test_pinned_batches_are_not_kept():
    """They are copies: of 16 workers and batches of 128 large images they would be 1.2 GB on every rank."""
    kept = {pin: batches(Numbers(), ValOrder(range(200), 5), 2, pin).mapped.maxlen for pin in (False, True)}
    assert kept == {False: 2 * KEPT, True: 0}


def test_advice_fits_the_run():
    assert "dist_lars.pack" in advice(3, packed=False, staged=False, cached=False)
    assert "dist_lars.pack" not in advice(3, packed=True, staged=False, cached=False)
    assert "--data.stage" in advice(3, packed=True, staged=False, cached=False)
    assert "now 3" in advice(3, packed=True, staged=True, cached=True)
