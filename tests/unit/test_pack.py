"""Packing: the same bytes however it is interrupted, exact counts, no mixing, everything skipped is named."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_lars import pack as command
from dist_lars.data import index_folder
from dist_lars.data.packing import Options, pack, shrink
from dist_lars.data.shards import packed_index, read_meta
from dist_lars.errors import UserError

KEEP = Options(size=None, quality=90, shard_mb=0.02)


def packed(folder, target, options=KEEP, workers=1, progress=lambda n: None):
    return pack(index_folder(str(folder)), str(target), options, workers, progress)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """(folder, its packing in shards of 20 KB)."""
    target = tmp_path_factory.mktemp("packed") / "train"
    packed(image_folder / "train", target)
    return target


def test_counts_are_exact_and_nothing_else_is_left(whole, image_folder):
    meta = read_meta(str(whole))
    assert meta["images"] == sum(s["images"] for s in meta["shards"]) == 24
    assert len(meta["shards"]) > 2
    assert {p.name for p in whole.iterdir()} == {"shards.json", "index.npz", *(s["name"] for s in meta["shards"])}
    for shard in meta["shards"]:
        with tarfile.open(whole / shard["name"]) as tar:
            assert len(tar.getnames()) == 2 * shard["images"]
        assert (whole / shard["name"]).stat().st_size == shard["bytes"] < 20_000 + 20_480


def test_every_image_is_the_file_it_was(whole, image_folder):
    shards, folder = packed_index(str(whole)), index_folder(str(image_folder / "train"))
    assert (shards.classes, len(shards)) == (folder.classes, 24)
    for i in range(24):
        assert (shards.read(i), shards.name(i), shards.labels[i]) == (folder.read(i), folder.name(i), folder.labels[i])


def test_shards_mix_the_classes(whole):
    with tarfile.open(whole / "shard-000000.tar") as tar:
        labels = [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".cls")]
    assert len(set(labels)) > 1


def test_workers_change_nothing(whole, image_folder, tmp_path):
    packed(image_folder / "train", tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(whole)


class Enough(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", [1, 7, 8, 23])
def test_an_interrupted_packing_goes_on_to_the_same_bytes(whole, image_folder, tmp_path, after):
    done = []

    def stop(n):
        done.append(n)
        if len(done) > after:
            raise Enough

    with pytest.raises(Enough):
        packed(image_folder / "train", tmp_path / "t", progress=stop)
    with pytest.raises(UserError, match="has not finished: run the same `dist_lars.pack` once more"):
        packed_index(str(tmp_path / "t"))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("shard-*.tar")}
    packed(image_folder / "train", tmp_path / "t")
    assert content(tmp_path / "t") == content(whole)
    assert all((tmp_path / "t" / name).stat().st_mtime_ns == t for name, t in kept.items())  # not written again


def test_a_half_written_shard_is_written_again(whole, image_folder, tmp_path):
    done = []

    def stop(n):
        done.append(n)
        if len(done) > 20:
            raise Enough

    with pytest.raises(Enough):
        packed(image_folder / "train", tmp_path / "t", progress=stop)
    first = tmp_path / "t" / "shard-000000.tar"
    first.write_bytes(first.read_bytes()[:1000])
    packed(image_folder / "train", tmp_path / "t")
    assert content(tmp_path / "t") == content(whole)


def test_a_finished_packing_is_left_alone(whole, image_folder):
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    done = []
    packed(image_folder / "train", whole, progress=done.append)
    assert sum(done) == 24
    assert before == {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}


def test_runs_are_not_mixed(whole, image_folder, tmp_path):
    with pytest.raises(UserError, match=r"holds another packing \(size None, now 256; shard_mb 0.02, now 512"):
        packed(image_folder / "train", whole, Options(256, 90, 512))
    with pytest.raises(UserError, match=r"holds another packing \(24 images listed, now 11\)"):
        packed(image_folder / "val", whole)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and nothing was packed there before"):
        packed(image_folder / "train", tmp_path)


def test_two_processes_do_not_pack_into_one_folder(image_folder, tmp_path):
    def again(n):
        packed(image_folder / "train", tmp_path / "t")

    with pytest.raises(UserError, match="another process is packing into"):
        packed(image_folder / "train", tmp_path / "t", progress=again)


def test_what_is_no_image_is_skipped_and_named(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "src")
    (tmp_path / "src" / "class0" / "003.jpg").write_bytes(b"")
    (tmp_path / "src" / "class2" / "005.jpg").write_text("moved")
    meta = packed(tmp_path / "src", tmp_path / "dst")
    assert meta["images"] == 22
    assert meta["skipped"] == [
        {"file": "class0/003.jpg", "why": "the file is empty"},
        {"file": "class2/005.jpg", "why": "no known image format"},
    ]
    index = packed_index(str(tmp_path / "dst"))
    assert [index.name(i) for i in (0, 1, 2)] == ["class0/000.jpg", "class0/006.jpg", "class0/009.jpg"]
    text = command.describe("train", "dst", meta, 2.0)
    assert "22 of 24 images" in text
    assert "class0/003.jpg: the file is empty" in text


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.jpg").write_text("text")
    with pytest.raises(UserError, match="none of the 1 files is an image; the first: .*x.jpg: no known image format"):
        packed(tmp_path / "src", tmp_path / "dst")


def jpeg(width: int, height: int, **options) -> bytes:
    file = io.BytesIO()
    small = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", **options)
    return file.getvalue()


def test_large_images_are_made_smaller_and_small_ones_keep_their_bytes():
    data = jpeg(400, 300)
    smaller = shrink(data, 128, 90)
    image = Image.open(io.BytesIO(smaller))
    assert image.size == (170, 128)
    assert len(smaller) < len(data)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((170, 128), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.asarray(image) - whole).mean() < 3
    assert shrink(data, 300, 90) == data
    assert shrink(data, None, 90) == data


def test_extensions_tell_the_content(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 200, 3)).save(tmp_path / "src" / "a" / "really.png")
    (tmp_path / "src" / "a" / "really.png").rename(tmp_path / "src" / "a" / "x.JPEG")
    packed(tmp_path / "src", tmp_path / "dst")
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["00000000.png", "00000000.cls"]


def test_the_command_packs_both_splits_and_verifies(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIST_LARS_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "dst"
    command.main([str(image_folder), str(target), "--size", "none", "--shard-mb", "0.02", "--workers", "1"])
    assert "train: 24 of 24 images" in capsys.readouterr().out
    command.main([str(target), "--verify"])
    assert "11 images in" in capsys.readouterr().out
    shard = target / "val" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-600] + b"x" * 600)
    with pytest.raises(SystemExit):
        command.main([str(target), "--verify"])
    assert "is not what was packed (its SHA-256 differs)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "where should the shards go"),
        (["a", "b", "--size", "big"], "--size is 'big', but it must be a number of pixels, or none"),
        (["a", "b", "--quality", "0"], "--quality is 0"),
        (["a", "b", "--shard_mb", "0"], "--shard_mb is 0"),
        (["a", "b", "--workers", "-3"], "--workers is -3"),
        (["a", "b", "--qualty", "9"], "did you mean quality"),
        (["nowhere", "b"], "data folder nowhere does not exist"),
    ],
)
def test_wrong_options_are_explained(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(words)
    assert message in capsys.readouterr().err


def test_shards_are_not_packed_again(whole, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(whole), str(tmp_path / "x")])
    assert "holds packed shards already" in capsys.readouterr().err
    assert json.loads((whole / "shards.json").read_text())["format"] == 1
