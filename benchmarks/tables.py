"""`python -m benchmarks.tables`: write the tables of README.md and docs/ anew, out of benchmarks/records.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function here, or `study_` and the name of a
study. A test holds the pages against what this would write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, show
from benchmarks.scaling_results import shown, spread

ROOT = Path(__file__).parent.parent
PAGES = tuple(ROOT / name for name in ("README.md", "docs/scaling.md", "docs/evidence.md"))
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def trainer() -> str:
    """Images/s of the trainer and of its peer."""
    names = {
        "ours, defaults": "dist_lars, defaults (bfloat16, channels-last)",
        "ours, fp32 contiguous": "dist_lars in float32 with contiguous weights",
        "Horovod's example": "Horovod's ImageNet example with ResNet-18",
    }
    rows = record.read("trainer")["rows"]
    speed = {(row["what"], row["ranks"]): row["images/s"] for row in rows}
    return show.markdown(
        {"trainer": label, **{f"images/s, {n} rank{'s' * (n > 1)}": speed[what, n] for n in (1, 2)}}
        for what, label in names.items()
    )


def optimizer() -> str:
    """One step of ResNet-50's parameters."""
    wanted = ("SGD fused", "SGD foreach", "LARS default", "LARS paper", "LAMB", "timm Lars", "timm Lamb")
    rows = [r for r in record.read("optimizer")["rows"] if r["model"] == "resnet50" and r["optimizer"] in wanted]
    return show.markdown(
        {"optimizer": r["optimizer"], "ms": r["ms"], "x torch's fused SGD": r["x fused"], "GB/s": r["GB/s"],
         "extra memory, MB": r["peak MB"]} for r in rows
    )  # fmt: skip


def memory() -> str:
    """Of one process, by batch."""
    rows = record.read("memory")["rows"]
    return show.markdown({"batch": r["batch"], "peak MiB": r["peak MiB"], "ratio": r["ratio"]} for r in rows)


def scaling_resnet18() -> str:
    """The sweep over ranks."""
    return scaling("scaling_resnet18", "--model resnet18 --batch 32")


def scaling_alexnet() -> str:
    """The same for the network with the most gradient per work."""
    return scaling("scaling_alexnet", "--model alexnet --batch 64")


def scaling_wire() -> str:
    """What compression changes."""
    return scaling("scaling_wire", "--name scaling_wire --carriers horovod --wire fp16,bf16 --image_size 112")


def scaling_passes() -> str:
    """What accumulated passes change; smaller ones, for all groups hold their memory at once."""
    return scaling(
        "scaling_passes", "--name scaling_passes --carriers horovod --accumulation 4,16 --batch 16 --image_size 112"
    )


def scaling_strong() -> str:
    """One batch shared by the ranks."""
    return scaling("scaling_strong", "--name scaling_strong --mode strong --batch 64 --image_size 112")


def scaling_real() -> str:
    """With images that are read, decoded and augmented."""
    return scaling("scaling_real", "--name scaling_real --carriers horovod --images DIR")


def scaling(name: str, command: str) -> str:
    """The rows of a sweep."""
    rows = _rows(name)
    if rows is None:
        return f"Not measured yet: `python -m benchmarks.scaling {command}`."
    who = {"none": "independent (ceiling)", "ddp": "torch's DDP", "torch": "our reducer on torch.distributed"}
    table = []
    for cells in shown(rows):
        carrier = "-" if cells["ranks"] == 1 else cells["carrier"]
        cells["carrier"] = who.get(carrier, carrier.capitalize())
        table.append({k: v for k, v in cells.items() if k not in ("hours", "node-hours")})
    return show.markdown(table) + _link(name, "json", "md", "png")


def allreduce() -> str:
    """Bus bandwidth by carrier at three sizes."""
    rows = _rows("allreduce")
    if rows is None:
        return "Not measured yet: `python -m benchmarks.allreduce`."
    sizes = list(dict.fromkeys(r["MB"] for r in rows))
    shown = [sizes[0], *sizes[len(sizes) // 2 :: 2]]
    table = []
    for carrier in dict.fromkeys(r["carrier"] for r in rows):
        mine = {r["MB"]: r for r in rows if r["carrier"] == carrier}
        cells = {f"{_size(mb)}": f"{mine[mb]['ms']:.3g} ms, {mine[mb]['bus GB/s']:.2g} GB/s" for mb in shown}
        table.append({"carrier": carrier, **cells})
    return show.markdown(table) + _link("allreduce")


def tune() -> str:
    """Each knob of the exchange against our defaults, these against themselves and against Horovod's own."""
    found = [body for name in ("tune_alexnet", "tune_resnet18") if (body := _record(name))]
    if not found:
        return "Not measured yet: `python -m benchmarks.tune --out comm.yaml`."
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for body in found:
        for r in body["rows"]:
            if r["value"] != "default":
                value = f"{r['value']} (the default itself)" if r.get("is the default") else r["value"]
                row = table.setdefault((r["knob"], value), {"knob": r["knob"], "value": value})
                row[f"{body['model']}, x default"] = spread(r["x default"], r["low"], r["high"], "{:.3f}")
    return show.markdown(table.values()) + "".join(_link(f"tune_{body['model']}") for body in found)


def overlap() -> str:
    """What of the communication is exposed."""
    found = [body for name in ("step_resnet18", "step_alexnet") if (body := _record(name))]
    if not found:
        return "Not measured yet: `python -m benchmarks.step`."
    rows = [
        {
            "model": body["model"],
            **{k: v for k, v in body["overlap"].items() if k != "steps" and not isinstance(v, list)},
        }
        for body in found
    ]
    return show.markdown(rows) + "".join(_link(f"step_{body['model']}") for body in found)


def study(name: str) -> str:
    """The accuracies of a study, from its report; another test holds that against the records."""
    report = (ROOT / f"benchmarks/records/study-{name}.md").read_text(encoding="utf-8")
    return report.split("\n## Top-1 accuracy, %\n\n")[1].split("\n\n")[0] + (
        f"\n\n([report and plots](benchmarks/records/study-{name}.md), [study](benchmarks/studies/{name}.yaml))"
    )


TABLES: Mapping[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        trainer,
        optimizer,
        memory,
        scaling_resnet18,
        scaling_alexnet,
        scaling_wire,
        scaling_passes,
        scaling_strong,
        scaling_real,
        allreduce,
        overlap,
        tune,
    )
} | {f"study_{path.stem}": partial(study, path.stem) for path in (ROOT / "benchmarks/studies").glob("*.yaml")}


def _record(name: str) -> dict[str, Any] | None:
    try:
        return record.read(name)
    except FileNotFoundError:
        return None


def _rows(name: str) -> list[dict[str, Any]] | None:
    body = _record(name)
    return body and body["rows"]


def _link(name: str, *kinds: str) -> str:
    words = {"json": "record", "md": "table", "png": "plot"}
    links = [f"[{words[kind]}](benchmarks/records/{name}.{kind})" for kind in kinds or ("json",)]
    return f"\n\n({', '.join(links)})"


def _size(mb: float) -> str:
    return f"{mb * 1e6:.0f} bytes" if mb < 1e-3 else f"{mb * 1e3:.0f} kB" if mb < 1 else f"{mb:.0f} MB"


def filled(text: str, page: Path) -> str:
    """The text of a page with every marked table written anew, its links led from there."""
    up = os.path.relpath(ROOT, page.parent)
    new = MARKS.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[3]}", text)
    return new.replace("](benchmarks/", f"]({up}/benchmarks/") if up != "." else new


def names(text: str) -> Iterable[str]:
    """Of the tables in the text."""
    return [m[2] for m in MARKS.finditer(text)]


def main() -> None:
    """Rewrite each page where a table is not current."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text, page)
        if new != text:
            page.write_text(new, encoding="utf-8")
        said = "written anew" if new != text else "all current"
        print(f"{page.relative_to(ROOT)}: {len(list(names(text)))} tables, {said}")


if __name__ == "__main__":
    main()
