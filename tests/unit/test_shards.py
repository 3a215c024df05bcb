"""Packed shards are the image folder by other means: same images, order, result; the webdataset library reads them."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lars.data import TrainOrder, batches, folder_sets, index_folder, list_folders, open_index, shard_indices
from dist_lars.data import stage as staging
from dist_lars.data.decode import BadImage
from dist_lars.data.order import permutation
from dist_lars.data.packing import Options, pack
from dist_lars.data.shards import packed_index
from dist_lars.errors import UserError
from tests.conftest import kept

OPTIONS = {"seed": 3, "image_size": 16, "resize": 20, "min_scale": 0.3, "flip": True}


@pytest.fixture(scope="module")
def packed(image_folder, tmp_path_factory):
    """The tiny folder, packed with its own bytes: a root with train/ and val/."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        index = index_folder(str(image_folder / split))
        pack(index, str(root / split), Options(None, 90, 0.02), 1, lambda n: None)
    return root


def sets_of(path):
    return folder_sets(*list_folders(str(path), None), **OPTIONS)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_from_shards_are_those_from_the_folder(image_folder, packed, rank):
    order = TrainOrder(24, 3, rank, 2, global_batch=8, micro_batch=2, start=0, stop=6)
    a, b = (kept(batches(sets_of(path).train, order, 0, pin=False)) for path in (image_folder, packed))
    assert len(a) == len(b) == 12
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert x.equal(u)
        assert y.equal(v)
    for i in range(11):
        assert np.array_equal(sets_of(image_folder).val[0, i][0], sets_of(packed).val[0, i][0])


def test_workers_read_shards_too(packed):
    order = TrainOrder(24, 3, 0, 1, global_batch=8, micro_batch=4, start=0, stop=3)
    images = folder_sets(*(i.shared() for i in list_folders(str(packed), None)), **OPTIONS).train
    alone, helped = (kept(batches(images, order, workers, pin=False)) for workers in (0, 1))
    assert all(x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(alone, helped, strict=True))


sizes = st.integers(1, 300)


@given(
    n=sizes, world=st.integers(1, 9), per_rank=st.integers(1, 5), seed=st.integers(0, 2**40), epoch=st.integers(0, 5)
)
@settings(max_examples=80, deadline=None)
def test_every_image_is_seen_at_most_once_an_epoch_and_steps_do_not_depend_on_ranks(n, world, per_rank, seed, epoch):
    batch = world * per_rank
    parts = [shard_indices(n, seed, epoch, r, world, batch) for r in range(world)]
    assert {p.shape for p in parts} == {(n // batch, per_rank)}  # equal steps on all ranks
    step_sets = np.concatenate(parts, axis=1)
    flat = step_sets.reshape(-1).tolist()
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(n))
    alone = shard_indices(n, seed, epoch, 0, 1, batch)
    assert np.array_equal(step_sets, alone)
    assert np.array_equal(permutation(n, seed, epoch)[: len(flat)], alone.reshape(-1))


@given(n=st.integers(1, 40), kilobytes=st.integers(2, 60), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_any_number_of_images_in_shards_of_any_size(tmp_path_factory, n, kilobytes, seed):
    rng = np.random.RandomState(seed)
    root = tmp_path_factory.mktemp("any")
    for i in range(n):
        folder = root / "src" / f"c{rng.randint(3)}"
        folder.mkdir(parents=True, exist_ok=True)
        size = rng.randint(1, 30, 2)
        header = f"P6 {size[0]} {size[1]} 255 ".encode()
        (folder / f"{rng.randint(1e9)}-{i}.ppm").write_bytes(header + rng.bytes(3 * size[0] * size[1]))
    index = index_folder(str(root / "src"))
    meta = pack(index, str(root / "dst"), Options(None, 90, kilobytes / 1000), 1, lambda n: None)
    shards = packed_index(str(root / "dst"))
    assert len(shards) == n == meta["images"]
    assert [shards.read(i) for i in range(n)] == [index.read(i) for i in range(n)]
    assert np.array_equal(shards.labels, index.labels)
    assert all(s["bytes"] <= max(kilobytes * 1000, 4096) + 10_240 for s in meta["shards"])


def test_webdataset_opens_the_shards(image_folder, packed):
    wds = pytest.importorskip("webdataset", reason="the webdataset library is not installed")
    last = len(list((packed / "train").glob("*.tar"))) - 1
    urls = f"{packed}/train/shard-{{000000..{last:06d}}}.tar"
    stream = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls")
    samples = {int(key): (pixels, label) for key, pixels, label in stream}
    index = index_folder(str(image_folder / "train"))
    assert sorted(samples) == list(range(24))
    from PIL import Image

    for i, (pixels, label) in samples.items():
        assert label == index.labels[i]
        assert np.array_equal(pixels, np.asarray(Image.open(index.path(i)).convert("RGB")))


def test_missing_and_short_shards_are_named(packed, tmp_path):
    shutil.copytree(packed / "train", tmp_path / "t")
    shard = tmp_path / "t" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard .*shard-000001.tar has [\d,]+ bytes, and should have"):
        open_index(str(tmp_path / "t"))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard .*shard-000001.tar is missing"):
        open_index(str(tmp_path / "t"))
    shutil.copy(packed / "train" / "shard-000001.tar", shard)
    (tmp_path / "t" / "index.npz").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read .*index.npz"):
        open_index(str(tmp_path / "t"))


def test_a_shard_that_shrinks_while_training_is_a_bad_image(packed, tmp_path):
    shutil.copytree(packed / "train", tmp_path / "u")
    index = open_index(str(tmp_path / "u"))
    for shard in (tmp_path / "u").glob("*.tar"):
        with shard.open("r+b") as file:
            file.truncate(600)
    with pytest.raises(BadImage, match=r"shard-.*tar \(class./.*jpg\).*the shard ends"):
        for i in range(24):
            index.read(i)


def test_another_format_is_refused(packed, tmp_path):
    shutil.copytree(packed / "train", tmp_path / "t")
    meta = tmp_path / "t" / "shards.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 7', 1))
    with pytest.raises(UserError, match="is of format 7, and this version reads 1: pack again"):
        open_index(str(tmp_path / "t"))


# --- staging ----------------------------------------------------------------------------------------------------------


def test_staging_copies_once_and_is_found_again(packed, tmp_path):
    target = tmp_path / staging.stage_name(str(packed / "train"))
    source = str(packed / "train")
    assert staging.stage(source, str(target)) == sum(p.stat().st_size for p in (packed / "train").glob("*.tar"))
    assert open_index(str(target)).read(5) == open_index(source).read(5)
    assert staging.stage(source, str(target)) == 0  # a requeued job
    (target / "shard-000001.tar").write_bytes(b"half")  # a copy that was cut off
    assert staging.stage(source, str(target)) == (packed / "train" / "shard-000001.tar").stat().st_size
    assert staging.stage_name(str(target)) == target.name
    staging.unstage(str(target))
    assert not target.exists()


STAGE = """
import sys
from dist_lars.data import stage
stage.stage(*sys.argv[1:])
print("staged", flush=True)
sys.stdin.read()
"""


def test_a_copy_that_another_job_reads_is_not_removed(packed, tmp_path):
    source, target = str(packed / "train"), tmp_path / "copy"
    words = [sys.executable, "-c", STAGE, source, str(target)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "staged\n"
    staging.stage(source, str(target))
    staging.unstage(str(target))
    assert open_index(str(target)).read(5) == open_index(source).read(5)
    other.kill()
    other.communicate()
    staging.unstage(str(target))
    assert not target.exists()


def test_a_job_that_waits_for_a_copy_finds_it_removed_and_makes_its_own(packed, tmp_path, monkeypatch):
    source, target = str(packed / "train"), tmp_path / "copy"
    staging.stage(source, str(target))
    monkeypatch.setattr(staging, "_used", {})  # as another process would have it
    real, removed = staging.lock, []

    def lock(path, **how):
        held = real(path, **how)
        if not removed:  # meanwhile the job that held it has cleaned up
            removed.append(True)
            shutil.rmtree(target)
        return held

    monkeypatch.setattr(staging, "lock", lock)
    assert staging.stage(source, str(target)) > 0
    assert open_index(str(target)).read(5) == open_index(source).read(5)


def test_staging_verifies(packed, tmp_path):
    shutil.copytree(packed / "train", tmp_path / "bad")
    shard = tmp_path / "bad" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard-000000.tar is not what was packed \(its SHA-256 differs\)"):
        staging.stage(str(tmp_path / "bad"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "shard-000000.tar").exists()
    assert not (tmp_path / "copy" / "shards.json").exists()


def test_staging_checks_the_room_before(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"needs .* GB more in .*, which has 0.0 GB free; choose another place"):
        staging.stage(str(packed / "train"), str(tmp_path / "copy"))
    assert not list((tmp_path / "copy").glob("*.tar"))


def test_a_stage_variable_that_is_not_set_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    with pytest.raises(UserError, match=r"data.stage \$SLURM_TMPDIR: the variable is not set on"):
        staging.expand("$SLURM_TMPDIR")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert staging.expand("$SLURM_TMPDIR/x") == str(tmp_path / "x")
