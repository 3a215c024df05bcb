"""`python -m dist_lars.train`: train as a preset, a file and the command line say.

horovodrun -np 64 python -m dist_lars.train                        resnet18_8k on $DIST_LARS_DATA
horovodrun -np 2 python -m dist_lars.train --preset quickstart     handwritten digits, no data needed
python -m dist_lars.train --dry_run --world_size 64                print the plan, start nothing
python -m dist_lars.train --list_presets                           the recipes and where their numbers are from
"""

import json
import sys
from typing import Any

from dist_lars import recipes
from dist_lars.cli import fail, make_parser, parse
from dist_lars.config import Config, data_path
from dist_lars.errors import UserError
from dist_lars.plan import describe, make_plan, planned_images


def main(argv: list[str] | None = None) -> None:
    """Parse, then plan (`--dry_run`) or train."""
    parser = make_parser("python -m dist_lars.train", __doc__ or "")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop: no data, GPU or ranks needed")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks that --dry_run plans for")
    parser.add_argument("--list_presets", action="store_true", help="show the recipes as a table and stop")
    parser.add_argument("--json", action="store_true", help="--dry_run prints JSON")
    try:
        config, extra = parse(sys.argv[1:] if argv is None else argv, parser)
        if extra["list_presets"]:
            print(recipes.table())
            return None
        if extra["dry_run"]:
            return dry_run(config, extra)
        data_path(config)
    except UserError as e:
        fail(e)
    from dist_lars import api, launch  # torch takes seconds to import: a plan or a wrong option need not wait for it

    return launch.as_job(lambda: api.start_ranks(config), lambda comm: api.train(config, comm))


def dry_run(config: Config, extra: dict[str, Any]) -> None:
    """Print the plan for `--world_size` ranks and the data sizes of the configuration."""
    plan = make_plan(config, extra["world_size"], *planned_images(config))
    print(json.dumps(plan.as_dict(), indent=1) if extra["json"] else describe(plan))


if __name__ == "__main__":
    main()
