"""`python -m dist_lars.evaluate --checkpoint PATH --data.path DIR`: one JSON line with loss, top1, top5 and count.

PATH is a run directory (its latest checkpoint), RUN_DIR/checkpoints/best, or a checkpoint file. DIR holds
val/CLASS/image.jpg, test/CLASS/image.jpg or CLASS/image.jpg. Works alone and under horovodrun or mpirun, which share
the images out.
"""

import json
import os
import sys
from typing import Literal

from dist_lars.cli import command_parser, fail, normalise, typed
from dist_lars.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse, evaluate, print."""
    parser = command_parser("python -m dist_lars.evaluate", __doc__ or "")
    parser.add_argument("--checkpoint", type=str, required=True, help="a run directory or a checkpoint file")
    given_path = os.environ.get("DIST_LARS_DATA")
    parser.add_argument(
        "--data.path", type=str | None, default=given_path, help="the images (default: $DIST_LARS_DATA)"
    )
    parser.add_argument("--data.workers", type=int | None, default=None, help="loader processes per rank")
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--backend", type=Literal["horovod", "torch"], default="horovod", help="as comm.backend")
    formats = Literal["auto", "fp32", "bf16", "fp16"]
    parser.add_argument("--precision", type=formats, default="auto", help="number format")
    try:
        given = typed(parser, normalise(sys.argv[1:] if argv is None else argv, parser))
    except UserError as e:
        fail(e)
    if given["data.path"] is None:
        fail(UserError("no images: name their folder with --data.path DIR or $DIST_LARS_DATA"))
    from dist_lars import api, launch
    from dist_lars import comm as ranks
    from dist_lars.resources import on_cpu

    def act(comm: ranks.Comm) -> None:
        scores = api.score(
            given["checkpoint"],
            given["data.path"],
            batch=given["batch"],
            workers=given["data.workers"],
            device=given["device"],
            precision=given["precision"],
            comm=comm,
        )
        if comm.rank == 0:
            print(json.dumps({name: scores[name] for name in ("loss", "top1", "top5", "count")}), flush=True)

    launch.as_job(lambda: ranks.start(cpu=on_cpu(given["device"]), backend=ranks.Backend(given["backend"])), act)


if __name__ == "__main__":
    main()
