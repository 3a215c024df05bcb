"""The presets as a table: what each trains, how, and whose numbers it uses."""

from dist_lars.cli import load_config, preset_names, preset_text
from dist_lars.plan import make_plan, planned_images

TITLES = ("name", "model", "batch", "optimizer", "peak LR", "warm-up", "source")


def table() -> str:
    """One line per preset, by model and batch."""
    rows = sorted((_row(name) for name in preset_names()), key=lambda row: (row[1], int(row[2].replace(",", ""))))
    columns = list(zip(TITLES, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in (TITLES, *rows))


def _row(name: str) -> tuple[str, ...]:
    c = load_config(name)
    plan = make_plan(c, 1, *planned_images(c))
    optimizer = f"lars, {c.optim.law} law" if c.optim.name == "lars" else c.optim.name
    warmup = f"{c.schedule.warmup_epochs:g} epochs"
    return name, c.model.name, f"{c.batch_size:,}", optimizer, f"{plan.rate.peak:g}", warmup, header(name)["source"][0]


def header(name: str) -> dict[str, list[str]]:
    """The lines of a preset's header by their word: {"command": [...], "source": [...], "accuracy": [...], ...}."""
    found: dict[str, list[str]] = {}
    word = ""
    for line in preset_text(name).splitlines()[1:]:
        if not line.startswith("#"):
            break
        word = line[4:14].strip() or word
        found.setdefault(word, []).append(line[14:].strip())
    return found
