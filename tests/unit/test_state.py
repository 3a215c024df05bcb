"""What a checkpoint holds beside weights and momentum, and who gets what of it."""

import copy

import pytest
import torch

from dist_lars import comm as ranks
from dist_lars import engine
from dist_lars.comm import LocalComm
from dist_lars.config import Config
from dist_lars.ema import Ema
from dist_lars.errors import UserError
from dist_lars.metrics import Counts
from dist_lars.optim import LARS
from dist_lars.plan import make_plan
from dist_lars.state import Progress, capture, restore

CONFIG, CLASSES = Config(batch_size=8, micro_batch=4), ("a", "b", "c", "d", "e")
CPU = torch.device("cpu")


class OneOf(LocalComm):
    """A rank of several that talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc]


def job_of(seed: int, comm: ranks.Comm = LocalComm()) -> engine.Job:  # noqa: B008
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    return engine.Job(
        model=model,
        optimizer=LARS(model.parameters(), lr=1.0),
        comm=comm,
        reducer=None,
        plan=make_plan(CONFIG, 1, 64, 8),
        device=CPU,
        autocast=None,
        scaler=torch.amp.GradScaler("cpu", enabled=True),
        seed=0,
        clip_norm=None,
        ema=Ema([*model.parameters(), *ranks.float_buffers(model)], 0.9),
    )


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
    got = {"buffers": ranks.pack(ranks.float_buffers(job.model))}
    with job.ema.swapped():
        got["ema_buffers"] = ranks.pack(ranks.float_buffers(job.model))
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
