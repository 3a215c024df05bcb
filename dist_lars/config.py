"""Every option of a run, as frozen dataclasses: its type, default, documentation and rules.

`dist_lars.cli` fills them from presets, YAML files and the command line. Nothing here imports torch, so a login
node can check a job.
"""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_type_hints

import yaml

from dist_lars.errors import UserError
from dist_lars.rules import check


def option(default: Any, help: str, key: str | None = None) -> Any:
    """A dataclass field with its documentation; `key` is its public name where Python reserves the word."""
    return field(default=default, metadata={"help": help, "key": key})


@dataclass(frozen=True)
class Data:
    kind: Literal["folder", "synthetic", "digits"] = option(
        "folder",
        "folder: train/CLASS/*.jpg and val/CLASS/*.jpg, or what dist_lars.pack made of them; synthetic: random images, "
        "no files; "
        "digits: scikit-learn's handwritten digits, written once as such a folder",
    )
    path: str | None = option(None, "the image folder, or its packed shards (default: $DIST_LARS_DATA)")
    val: str | None = option(None, "validation folder (default: val/, else test/, below data.path)")
    hold_out: float = option(0.0, "validate on this share of the training images instead: to choose options by")
    image_size: int = option(224, "pixels of the square that the network sees")
    resize: int = option(256, "validation: the shorter side before the centre crop, in pixels")
    augment: Literal["inception", "minimal"] = option(
        "inception",
        "training: inception is a random resized crop; minimal a resize to data.resize squared, whatever the aspect, "
        "and a random crop; validation is the same for both",
    )
    min_scale: float = option(0.08, "training: smallest share of the area that a random resized crop keeps")
    flip: bool = option(True, "training: mirror every second image")
    workers: int | None = option(None, "loader processes per rank (default: from the cores of this rank)")
    on_error: Literal["fail", "skip"] = option(
        "fail", "a file that is no image: fail, or skip (training takes another in its place, validation leaves it out)"
    )
    max_skipped: int = option(100, "files that on_error skip allows, over all ranks")
    stage: str | None = option(None, "copy packed shards to this folder of each node first, e.g. $SLURM_TMPDIR")
    stage_keep: bool = option(True, "leave the copy for the next job; false removes it when the run has ended")
    cache: Literal["none", "bytes", "decoded"] = option(
        "none", "hold the training images in the memory of every rank, as files or decoded: for small sets"
    )
    cache_val: bool | None = option(
        None, "hold the validation images in memory, ready for the network (default: when a quarter of it is enough)"
    )
    classes: int = option(1000, "number of classes of synthetic data (a folder's are counted)")
    train_images: int = option(1_281_167, "training images for synthetic data and --dry_run (a folder's are counted)")
    val_images: int = option(50_000, "validation images for synthetic data and --dry_run (a folder's are counted)")


@dataclass(frozen=True)
class Model:
    name: Literal[
        "alexnet", "alexnet_bn", "alexnet_bn_all", "alexnet_small", "cnn_small", "resnet_small",
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    ] = option(
        "resnet18",
        "the architecture: alexnet is the network of 2012, alexnet_bn the LARS paper's, alexnet_bn_all has BatchNorm "
        "after every convolution; the small ones are for 32 to 64 px",
    )  # fmt: skip
    init: Literal["own", "he"] = option(
        "own", "own: as the network's source has it (ResNets: He, AlexNets: Gaussian); he: He normal, fan out, for all"
    )
    zero_gamma: bool = option(
        False, "ResNets: start the last BatchNorm of every block at 0, hence blocks as identities"
    )
    fc_std: float | None = option(None, "start the last linear layer from N(0, this), bias 0 (default: the network's)")
    bias_init: float | None = option(None, "start value of every bias of convolutions and linear layers, the last one "
                                           "included (default: the network's)")  # fmt: skip
    stem: Literal["imagenet", "small"] = option(
        "imagenet", "ResNets: small is a 3x3 convolution without stride or pool, for images up to 64 px"
    )
    grouped: bool = option(True, "AlexNets: convolutions 2, 4 and 5 in two groups, as on the two GPUs of 2012")
    dropout: float = option(0.5, "AlexNets: dropout before the hidden linear layers")
    weights: str | None = option(None, "start from a file: a checkpoint of ours, or a state_dict of the same network")
    channels_last: bool = option(True, "keep weights channels-last in memory, as fast convolutions want them")


@dataclass(frozen=True)
class Optim:
    name: Literal["lars", "lamb", "sgd", "sgd_momentum", "nesterov", "adam", "adamw"] = option(
        "lars", "the optimizer; sgd is without momentum"
    )
    law: Literal["default", "paper", "mlperf", "outside", "larc"] = option("default", "which LARS: see optim.LAWS")
    lr: float | None = option(None, "peak learning rate as it is; replaces schedule.base_lr and its scaling")
    momentum: float = option(0.9, "momentum of lars, sgd and nesterov")
    weight_decay: float = option(5e-4, "weight decay, coupled (adamw: decoupled)")
    trust_coefficient: float = option(0.001, "LARS: share of ||w|| that one step at rate 1 may move")
    min_norm: float | None = option(None, "LARS: ratio 1 where ||w|| is below this (default: what the law says)")
    exclude_from_adaptation: Literal["none", "bn_bias"] | None = option(
        None, "parameters without a trust ratio (default: what the law says)"
    )
    exclude_from_decay: Literal["none", "bn_bias"] | None = option(
        None, "parameters without weight decay (default: what the law says)"
    )
    bias_lr_scale: float = option(1.0, "learning rate of biases relative to that of the weights")
    clip_norm: float | None = option(None, "clip the global gradient norm to this (default: no clipping)")
    label_smoothing: float = option(0.0, "training loss: share of each label that is spread over all classes")
    ema_decay: float = option(0.0, "keep a running average of the weights and evaluate it, e.g. 0.999 (0: off)")


@dataclass(frozen=True)
class Schedule:
    scaling: Literal["linear", "sqrt", "none"] = option(
        "linear", "how the learning rate grows with batch_size / base_batch"
    )
    base_lr: float = option(0.1, "learning rate at base_batch")
    base_batch: int = option(256, "the batch that base_lr belongs to")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up from start_lr to the peak")
    start_lr: float = option(0.0, "where warm-up starts; its first step is one increment above")
    decay: Literal["poly", "cosine", "step", "constant"] = option("poly", "what follows the warm-up")
    power: float = option(2.0, "exponent of the polynomial decay")
    milestones: tuple[float, ...] = option((30.0, 60.0, 80.0), "step decay: epochs (from the first) of its drops")
    gamma: float = option(0.1, "step decay: factor at each milestone")
    end_lr: float = option(0.0, "learning rate at the end of the decay")
    decay_epochs: float | None = option(None, "length of the decay (default: all epochs after warm-up)")


@dataclass(frozen=True)
class Resume:
    start: str = option("auto", "auto: the newest checkpoint of run_dir if there is one; never; or a path", key="from")
    allow: tuple[str, ...] = option((), "options that may differ from those of the run that is continued")
    save_epochs: int = option(1, "save after every so many epochs (and at the end); the best is one that was saved")
    save_steps: int | None = option(None, "save after every so many steps, too")
    save_minutes: float | None = option(None, "save after every so many minutes, too")
    keep: int = option(3, "newest checkpoints to keep, beside the best")
    on_save_error: Literal["continue", "stop"] = option(
        "continue", "what to do when a checkpoint cannot be written (disk full); the one before stays good"
    )


@dataclass(frozen=True)
class Guard:
    nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop", "when a gradient is inf or nan: stop and save the state for inspection, skip the step, or go back to "
        "the last checkpoint with half the learning rate",
    )  # fmt: skip
    max_skips: int = option(10, "give up after so many skipped steps, or rolled-back ones")
    max_loss: float | None = option(None, "a loss that counts as diverged (default: 3 x ln(classes))")
    max_loss_steps: int = option(200, "stop when the loss stays above max_loss for so many steps")
    check_steps: int = option(500, "compare the replicas of all ranks after every so many steps")
    hang_seconds: float | None = option(
        None, "end the job when a rank makes no progress for so long (default: 300 s, or 30 x the longest step)"
    )


@dataclass(frozen=True)
class Comm:
    backend: Literal["horovod", "torch"] = option(
        "horovod", "who carries gradients: Horovod, or torch.distributed (NCCL between GPUs, gloo between CPUs)"
    )
    wire: Literal["fp32", "fp16", "bf16"] = option(
        "fp32", "number format of gradients on their way; 16 bits halve the traffic and round the sums"
    )
    deterministic: bool = option(False, "bit-repeatable sums for any number of ranks (buckets are never fused)")
    bucket_mb: float = option(25.0, "gradients travel in buckets of about so many MB, larger ones alone")
    cycle_ms: float | None = option(
        None, "Horovod: pause of its background thread (default: $HOROVOD_CYCLE_TIME, else from the device)"
    )
    fusion_mb: float | None = option(
        None, "Horovod: buckets that wait are sent together up to so many MiB (default: $HOROVOD_FUSION_THRESHOLD, "
        "else Horovod's)",
    )  # fmt: skip
    cache: int | None = option(None, "Horovod: tensors whose negotiation is remembered (default: Horovod's)")
    hierarchical: bool | None = option(None, "Horovod: add up within a node first (default: Horovod's)")


@dataclass(frozen=True)
class Log:
    every_steps: int = option(10, "steps between two lines of the run log")
    trust_steps: int = option(100, "LARS, LAMB: steps between two lines with the trust ratio of every tensor")
    eval_epochs: int = option(1, "evaluate after every so many epochs (and at the end)")
    tensorboard: bool = option(True, "write TensorBoard files to run_dir/tensorboard")
    progress: bool = option(True, "show a progress bar on rank 0")


@dataclass(frozen=True)
class Config:
    batch_size: int = option(256, "global batch: images per optimizer step over all ranks")
    micro_batch: int = option(32, "images per forward pass on one rank (also: images per BatchNorm statistic)")
    epochs: int = option(90, "passes over the training images")
    seed: int = option(0, "initial weights, order, augmentation and dropout all follow from it")
    run_dir: str | None = option(None, "where everything is written (default: runs/NAME-DATE-TIME)")
    name: str = option("custom", "name of the recipe, used in run_dir and logs")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 where the hardware has it, else fp32; fp16 (with loss scaling) needs CUDA"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda:local_rank when there is one")
    max_time: str | None = option(
        None, "save and stop before this much time has passed: HH:MM:SS, D-HH:MM:SS or minutes"
    )
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    resume: Resume = field(default_factory=Resume)
    guard: Guard = field(default_factory=Guard)
    comm: Comm = field(default_factory=Comm)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        check(self)


# --- names: the nested dataclasses as one flat table ------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One option: where it lives and what `--help` says of it."""

    key: str  # public, dotted: "resume.from"
    group: str  # dataclass field of Config, "" at the top
    attribute: str  # field of the group
    type: Any
    default: Any
    help: str


def _leaves() -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}

    def visit(cls: type, group: str) -> None:
        types = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(types[f.name]):
                visit(types[f.name], f.name)
                continue
            key = f"{group}." * bool(group) + (f.metadata["key"] or f.name)
            found[key] = Leaf(key, group, f.name, types[f.name], f.default, f.metadata["help"])

    visit(Config, "")
    return found


LEAVES = _leaves()


def as_flat(config: Config) -> dict[str, Any]:
    """{"batch_size": 8192, "optim.lr": None, ...}: every option under its public name."""
    nested = dataclasses.asdict(config)
    return {k: (nested[leaf.group] if leaf.group else nested)[leaf.attribute] for k, leaf in LEAVES.items()}


def from_flat(flat: dict[str, Any]) -> Config:
    """The inverse of `as_flat`; missing options get their defaults, unknown ones are refused."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        leaf = LEAVES.get(key) or unknown(key, list(LEAVES))
        groups.setdefault(leaf.group, {})[leaf.attribute] = value
    types = get_type_hints(Config)
    top = groups.pop("", {})
    return Config(**top, **{name: types[name](**values) for name, values in groups.items()})


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `--config` reads back to an equal Config."""
    nested: dict[str, Any] = {}
    for key, value in as_flat(config).items():
        group, _, name = key.rpartition(".")
        target = nested.setdefault(group, {}) if group else nested
        target[name] = plain(value)
    return str(yaml.safe_dump(nested, sort_keys=False))


def flat_yaml(text: str, origin: str) -> dict[str, Any]:
    """A YAML text as {public key: raw value}; `optim: {lr: 1}` and `optim.lr: 1` mean the same."""
    try:
        loaded = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(loaded, dict):
        raise UserError(f"{origin}: expected `key: value` lines, found {type(loaded).__name__}")
    flat: dict[str, Any] = {}
    for key, value in loaded.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {str(key): value})
    return flat


def plain(value: Any) -> Any:
    """The same value with lists for tuples, as JSON, YAML and checkpoints keep it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def data_path(config: Config) -> str | None:
    """The image folder of this run: data.path, else $DIST_LARS_DATA; None where the kind of data needs none."""
    if config.data.kind != "folder":
        if config.data.path:
            raise UserError(f"data.path {config.data.path} would not be read: that takes --data.kind folder")
        return None
    if not (path := config.data.path or os.environ.get("DIST_LARS_DATA")):
        raise UserError(
            "no data: name an image folder (PATH/train/CLASS/image.jpg and PATH/val/CLASS/image.jpg) with --data.path "
            "PATH or $DIST_LARS_DATA; `--preset quickstart` needs none, `--data.kind synthetic` takes random images"
        )
    return path


def unknown(key: str, known: list[str]) -> NoReturn:
    """Refuse an option name, naming the nearest ones."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    last = key.rpartition(".")[2]
    short = "".join(word[:1] for word in last.split("_"))  # learning_rate, which is lr here
    close = [k for k in known if k.rpartition(".")[2] == short and "_" in last] + close
    close += [k for k in known if k.rpartition(".")[2] == last and k not in close]
    hint = f"; did you mean {' or '.join(close[:3])}?" if close else "; --help lists all options"
    raise UserError(f"unknown option {key!r}{hint}")
