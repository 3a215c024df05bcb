"""From words to a Config: presets, YAML files and dotted command-line options, typed by jsonargparse.

Layers, later ones win: the defaults of `dist_lars.config`, `--preset NAME`, `--config FILE.yaml`, `--group.key value`.
Keys are spelled with underscores; on the command line a dash is accepted for an underscore.
"""

import argparse
import difflib
import functools
import socket
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import jsonargparse
import yaml

from dist_lars.config import LEAVES, Config, flat_yaml, from_flat, plain, unknown
from dist_lars.errors import UserError
from dist_lars.launchers import is_first_process, rank_of

DEFAULT_PRESET = "resnet18_8k"
LAST_WORD = 5.0  # seconds that other ranks leave to the first one, and to the launcher


def preset_names() -> list[str]:
    """Names that `--preset` accepts, sorted."""
    files = resources.files("dist_lars").joinpath("presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The preset's YAML file as text, its header of comments included."""
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.3)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown preset {name!r};{hint} known: {', '.join(preset_names())}")
    return resources.files("dist_lars").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


def load_config(preset: str | None = None, file: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """A Config from Python: `load_config("quickstart", overrides={"epochs": 3, "optim.lr": 1.0})`.

    Raises `UserError` for an unknown preset or key, a wrong type or a value out of range.
    """
    return from_flat(typed_options(_layers(preset, file) | (overrides or {})))


def typed_options(raw: dict[str, Any]) -> dict[str, Any]:
    """The same options with values of their types, as `from_flat` takes them; unknown ones are refused."""
    for key in raw:
        if key not in LEAVES:
            unknown(key, list(LEAVES))
    values = typed(_option_parser(), _as_arguments(raw))
    return {key: values[key] for key in raw}


@functools.cache
def _option_parser() -> jsonargparse.ArgumentParser:
    return make_parser("options", "")


def parse(argv: list[str], parser: jsonargparse.ArgumentParser) -> tuple[Config, dict[str, Any]]:
    """Command line -> (Config, the parser's own options such as `--dry_run`)."""
    argv = normalise(argv, parser)
    preset, file, rest = _take(argv)
    if preset is None and file is None:
        preset = DEFAULT_PRESET
    values = typed(parser, [*_as_arguments(_layers(preset, file)), *rest])
    return _config(values), {k: v for k, v in values.items() if k not in LEAVES}


def _config(values: dict[str, Any]) -> Config:
    return from_flat({k: v for k, v in values.items() if k in LEAVES})


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of a description, for they show commands."""


def command_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser that takes no abbreviations (`--epoch` is not `--epochs`) and raises instead of leaving."""
    return jsonargparse.ArgumentParser(
        prog=prog, description=description, formatter_class=_Help, allow_abbrev=False, exit_on_error=False
    )


def make_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with one documented option for every key of the configuration."""
    parser = command_parser(prog, description)
    parser.add_argument("--preset", default=None, help=f"a recipe, one of: {', '.join(preset_names())}")
    parser.add_argument("--config", default=None, help="a YAML file of options, on top of the preset if both are given")
    titles = {leaf.group: parser.add_argument_group(leaf.group or "run") for leaf in LEAVES.values()}
    for key, leaf in LEAVES.items():
        titles[leaf.group].add_argument(f"--{key}", type=leaf.type, default=leaf.default, help=leaf.help)
    return parser


def _layers(preset: str | None, file: str | None) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    if preset:
        raw |= {"name": preset} | _read_flat(preset_text(preset), f"preset {preset}")
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as e:
            raise UserError(f"--config {file}: {e.strerror}") from e
        raw |= ({} if preset else {"name": Path(file).stem}) | _read_flat(text, file)
    return raw


def _read_flat(text: str, origin: str) -> dict[str, Any]:
    flat = flat_yaml(text, origin)
    for key in flat:
        if key not in LEAVES:
            try:
                unknown(key, list(LEAVES))
            except UserError as e:
                raise UserError(f"{origin}: {e}") from None
    return flat


def _as_arguments(raw: dict[str, Any]) -> list[str]:
    """Raw values as command-line words, so that files, Python and the shell share one way of typing."""
    return [f"--{k}={v if isinstance(v, str) else _flow(v)}" for k, v in raw.items()]


def _flow(value: Any) -> str:
    return yaml.safe_dump(plain(value), default_flow_style=True).removesuffix("...\n").strip()


def normalise(argv: list[str], parser: jsonargparse.ArgumentParser) -> list[str]:
    """Dashes in option names become underscores; an unknown option fails, naming the nearest ones."""
    known = [s[2:] for s in parser._option_string_actions if s.startswith("--") and not s.endswith("+")]
    result = []
    for token in argv:
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or token == "--":
            result.append(token)
        elif name in known:
            result.append(f"--{name}{equals}{value}")
        else:
            unknown(name, known)
    return result


def _take(argv: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Pull `--preset` and `--config` out, wherever they stand: they are layers below every other option."""
    taken: dict[str, str | None] = {"--preset": None, "--config": None}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in taken:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{name} needs a value")
        taken[name] = value
    return taken["--preset"], taken["--config"], rest


def typed(parser: jsonargparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Parse `argv` into {option: value}, turning the library's errors into one line."""
    try:
        return vars(parser.parse_args(argv).as_flat())
    except (jsonargparse.ArgumentError, ValueError, TypeError) as e:
        raise UserError(_explain(" ".join(str(e).split()), argv)) from e


def _explain(message: str, argv: list[str]) -> str:
    """The library's message in our words when it is about one option's type."""
    named = [key for key in LEAVES if f'key "{key}"' in message]
    if not named:
        return message
    key = named[0]
    given = [b if a == f"--{key}" else a.partition("=")[2] for a, b in zip(argv, [*argv[1:], ""], strict=True)
             if a == f"--{key}" or a.startswith(f"--{key}=")]  # fmt: skip
    return f"{key} is {given[-1] if given else None!r}, but it must be {_wanted(key)}"


def _wanted(key: str) -> str:
    kind = LEAVES[key].type
    if get_origin(kind) is tuple:
        return "a list such as [30, 60, 80]"
    inner = kind if get_origin(kind) is Literal else next(iter(get_args(kind)), kind)  # Optional[X] -> X
    if get_origin(inner) is Literal:
        return f"one of {', '.join(map(str, get_args(inner)))}"
    return {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(inner.__name__, inner.__name__)


def fail(error: UserError) -> NoReturn:
    """Print the text and leave with exit code 2, as argument parsers do; once for a job whose ranks all fail alike.

    The first process speaks at once, and launchers end all ranks at the first exit. Another one that is still there
    after a while is alone with its error: the first one waits for it somewhere, and cannot know.
    """
    who = ""
    if not is_first_process():
        time.sleep(LAST_WORD)
        who = f" (rank {rank_of()} on {socket.gethostname()})"
    print(f"error: {error}{who}", file=sys.stderr, flush=True)
    raise SystemExit(2)
