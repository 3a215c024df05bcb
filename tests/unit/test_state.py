"""What a checkpoint holds beside weights and momentum, and who gets what of it."""

import copy

import pytest
import torch

from dist_lars import comm as ranks
from dist_lars import engine
from dist_lars import state as state_module
from dist_lars.api import make_optimizer
from dist_lars.comm import LocalComm
from dist_lars.config import Config, Optim, Resume
from dist_lars.ema import Ema
from dist_lars.errors import UserError
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from dist_lars.state import Progress, capture, restore

CONFIG, CLASSES = Config(batch_size=8, micro_batch=4), ("a", "b", "c", "d", "e")
CPU = torch.device("cpu")


class OneOf(LocalComm):
    """A rank of several that talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc]


def job_of(
    seed: int,
    comm: ranks.Comm = LocalComm(),  # noqa: B008
    images: int = 64,
    autocast: torch.dtype | None = None,
    **optim,
) -> engine.Job:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    return engine.Job(
        model=model,
        optimizer=make_optimizer(allowing(**optim), model, 1.0),
        comm=comm,
        reducer=None,
        plan=make_plan(CONFIG, 1, images, 8),
        device=CPU,
        autocast=autocast,
        scaler=torch.amp.GradScaler("cpu", enabled=True),
        seed=0,
        clip_norm=None,
        ema=Ema([*model.parameters(), *ranks.float_buffers(model)], 0.9),
    )


def allowing(*also: str, **optim) -> Config:
    """The run's configuration with other options of the optimizer, which --resume.allow excuses."""
    names = (*also, *(f"optim.{name}" for name in optim))
    return Config(batch_size=8, micro_batch=4, optim=Optim(**optim), resume=Resume(allow=names))


def trained(job: engine.Job, steps: int, counts: Counts) -> engine.Job:
    for step in range(steps):
        batch = [(torch.randn(4, 3, 2, 2), torch.arange(4)) for _ in range(2)]
        engine.train_step(job, iter(batch), step, counts, engine.Clock())
    return job


def everything(job: engine.Job, counts: Counts) -> list[torch.Tensor]:
    momenta = [s["momentum_buffer"] for s in job.optimizer.state.values()]
    return [*job.model.state_dict().values(), *momenta, *job.ema.average, counts.sums]


def test_all_of_a_run_comes_back():
    counts = Counts(CPU)
    job = trained(job_of(1), 3, counts)
    job.scaler.update(512.0)
    progress = Progress(step=3, lr_factor=0.25, skipped=4, rollbacks=2)
    state = copy.deepcopy(capture(job, CONFIG, CLASSES, progress, counts))
    other, empty = job_of(2), Counts(CPU)
    assert restore(other, state, CONFIG, CLASSES, empty, "x.pt") == progress
    assert other.scaler.get_scale() == 512.0
    for a, b in zip(everything(job, counts), everything(other, empty), strict=True):
        assert torch.equal(a, b)


class Echo(OneOf):
    """A rank whose fellows say what it says, plus their number; it notes how many bytes that would be."""

    heard = 0

    def gather(self, value, name):
        if not isinstance(value, torch.Tensor):
            return self.size * [value]
        self.heard = max(self.heard, self.size * value.untyped_storage().nbytes())
        return [value + rank for rank in range(self.size)]


@pytest.mark.parametrize("rank", [0, 1])
def test_buffers_are_kept_by_the_first_rank_alone_and_come_in_pieces(rank, monkeypatch):
    """Ten numbers of each of three ranks, at most nine at a time, in the buffers' own format."""
    monkeypatch.setattr(state_module, "GATHERED", 9)
    job, counts = job_of(1, Echo(rank, 3)), Counts(CPU)
    buffers = capture(job, CONFIG, CLASSES, Progress(), counts)["buffers"]
    own = torch.cat([b for b in job.model.buffers() if b.is_floating_point()])
    assert len(own) == 10
    assert job.comm.heard == 9 * 4
    assert len(buffers) == (3 if rank == 0 else 0)
    assert all(b.dtype == torch.float32 and torch.equal(b, own + n) for n, b in enumerate(buffers))


def of_two_ranks() -> dict:
    counts = Counts(CPU)
    state = copy.deepcopy(capture(trained(job_of(1), 2, counts), CONFIG, CLASSES, Progress(2), counts))
    for name in ("buffers", "ema_buffers"):
        state[name] = [state[name][0], state[name][0] + 2]
    for name in ("model", "ema"):  # in which lies the mean
        state[name] = {k: v + 1 if "running" in k else v for k, v in state[name].items()}
    state["partial"] = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
    return state


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (0, 1), (0, 3), (2, 3)])
def test_each_rank_gets_its_own_buffers_at_the_same_size_and_their_mean_at_another(rank, size):
    state, counts = of_two_ranks(), Counts(CPU)
    job = job_of(2, OneOf(rank, size))
    restore(job, state, CONFIG, CLASSES, counts, "x.pt")
    got = {"buffers": ranks.pack(ranks.float_buffers(job.model)).float()}
    with job.ema.swapped():
        got["ema_buffers"] = ranks.pack(ranks.float_buffers(job.model)).float()
    for name, values in got.items():
        expected = state[name][rank] if size == 2 else (state[name][0] + state[name][1]) / 2
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    whole = [11.0, 22.0, 33.0, 44.0]
    assert counts.sums.tolist() == (state["partial"][rank] if size == 2 else whole if rank == 0 else [0.0] * 4)


def test_another_configuration_and_other_classes_are_refused():
    counts = Counts(CPU)
    state = capture(job_of(1), CONFIG, CLASSES, Progress(), counts)
    with pytest.raises(UserError, match=r"seed: 0 -> 1.*--resume.allow '\[seed\]'"):
        restore(job_of(1), state, Config(batch_size=8, micro_batch=4, seed=1), CLASSES, counts, "x.pt")
    with pytest.raises(UserError, match="trained on other classes"):
        restore(job_of(1), state, CONFIG, ("a", "b"), counts, "x.pt")


SETTINGS = [
    {"weight_decay": 0.25}, {"momentum": 0.5}, {"trust_coefficient": 0.25}, {"min_norm": 0.25}, {"law": "paper"},
    {"weight_decay": 0.25, "momentum": 0.5, "trust_coefficient": 0.02, "law": "paper"},
]  # fmt: skip


@pytest.mark.parametrize("optim", SETTINGS, ids=lambda optim: "-".join(optim))
def test_options_of_the_optimizer_that_may_differ_are_those_of_the_run_that_goes_on(optim):
    """And nothing else is: the momentum is the saved one, the rate, which each step sets, too."""
    counts = Counts(CPU)
    before = trained(job_of(1), 2, counts)
    engine.set_lr(before.optimizer, 0.125)
    after = job_of(2, **optim)
    state = copy.deepcopy(capture(before, CONFIG, CLASSES, Progress(2), counts))
    restore(after, state, allowing(**optim), CLASSES, counts, "x.pt")
    settings = [{k: v for k, v in g.items() if k != "params"} for g in after.optimizer.param_groups]
    fresh = [
        {k: v for k, v in g.items() if k != "params"} | {"lr": 0.125} for g in job_of(2, **optim).optimizer.param_groups
    ]
    assert settings == fresh
    assert settings != [{k: v for k, v in g.items() if k != "params"} for g in before.optimizer.param_groups]
    for a, b in zip(everything(before, counts), everything(after, counts), strict=True):
        assert torch.equal(a, b)
    trained(after, 1, counts)  # and all of it is there to go on with


@pytest.mark.parametrize(
    ("optim", "what"),
    [
        ({"name": "sgd_momentum"}, "optim.name lars -> sgd_momentum"),
        ({"name": "adam"}, "optim.name lars -> adam"),
        ({"law": "outside"}, "optim.law default -> outside: .* learning rate inside"),
        ({"bias_lr_scale": 2.0}, "other groups of parameters"),
        ({"exclude_from_decay": "bn_bias"}, "other groups of parameters"),
    ],
)
def test_a_state_that_the_new_options_cannot_continue_is_refused(optim, what):
    counts = Counts(CPU)
    state = copy.deepcopy(capture(trained(job_of(1), 2, counts), CONFIG, CLASSES, Progress(2), counts))
    with pytest.raises(UserError, match=f"x.pt cannot be continued with {what}.*--model.weights x.pt"):
        restore(job_of(1, **optim), state, allowing(**optim), CLASSES, counts, "x.pt")


def test_groups_that_only_look_alike_are_refused():
    """As many groups of as many tensors, but others: momentum would come to the wrong ones."""
    counts = Counts(CPU)
    state = copy.deepcopy(capture(job_of(1, bias_lr_scale=2.0), CONFIG, CLASSES, Progress(), counts))
    names = state["optimizer"]["param_groups"][0]["param_names"]
    names[:2] = names[1::-1]
    with pytest.raises(UserError, match="other groups of parameters"):
        restore(job_of(1, bias_lr_scale=2.0), state, allowing(bias_lr_scale=2.0), CLASSES, counts, "x.pt")


def test_loss_scaling_may_begin_in_the_middle_of_a_run():
    counts = Counts(CPU)
    state = capture(job_of(1), CONFIG, CLASSES, Progress(), counts)
    job = job_of(1)
    before = job.scaler.state_dict()
    restore(job, state | {"scaler": {}}, CONFIG, CLASSES, counts, "x.pt")
    assert job.scaler.state_dict() == before


@pytest.mark.parametrize(
    ("now", "what", "name"),
    [
        ({"images": 63}, "data.train_images: 64 -> 63", "data.train_images"),
        ({"autocast": torch.bfloat16}, "precision: fp32 -> bf16", "precision"),
    ],
)
def test_other_images_and_another_number_format_are_another_run(now, what, name):
    """The options are equal: a file has gone from the folder, or `precision auto` found other hardware."""
    counts = Counts(CPU)
    state = capture(job_of(1), CONFIG, CLASSES, Progress(), counts)
    with pytest.raises(UserError, match=rf"{what}\).*--resume.allow '\[{name}\]'"):
        restore(job_of(1, **now), state, CONFIG, CLASSES, counts, "x.pt")
    restore(job_of(1, **now), state, allowing(name), CLASSES, counts, "x.pt")
    restore(job_of(1, OneOf(1, 4)), state, CONFIG, CLASSES, counts, "x.pt")  # which another number of ranks is not
    state.pop("precision")  # as the first versions wrote it
    restore(job_of(1, autocast=torch.bfloat16), state, CONFIG, CLASSES, counts, "x.pt")


def test_a_number_format_that_was_chosen_or_told_is_the_same():
    """What `auto` stood for may be said aloud where the hardware is another."""
    counts = Counts(CPU)
    state = capture(job_of(1, autocast=torch.bfloat16), CONFIG, CLASSES, Progress(), counts)
    told = Config(batch_size=8, micro_batch=4, precision="bf16")
    assert restore(job_of(1, autocast=torch.bfloat16), state, told, CLASSES, counts, "x.pt") == Progress()
