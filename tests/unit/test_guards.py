"""Numbers that go wrong: a gradient that is not finite, a loss that runs away, replicas that differ."""

import math
import time

import pytest
import torch

from dist_lars import engine, guards, runlog
from dist_lars.comm import LocalComm
from dist_lars.config import Config, Guard, Resume
from dist_lars.ema import Ema
from dist_lars.guards import (
    Diverged,
    LossBound,
    default_bound,
    first_difference,
    gradient_norm,
    not_finite,
    tensor_sums,
)
from dist_lars.metrics import Counts
from dist_lars.optim import LARS
from dist_lars.plan import make_plan
from dist_lars.state import Progress
from dist_lars.stopping import MARGIN, StopNotes
from dist_lars.supervisor import RollBack, Supervisor


@pytest.fixture(autouse=True)
def deaf(monkeypatch):
    """Leave the signal handlers of the test process alone."""
    monkeypatch.setattr(StopNotes, "listen", lambda self: None)


def job_of(guard: Guard = Guard(), clip_norm: float | None = None, scaler: bool = False) -> engine.Job:  # noqa: B008
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    return engine.Job(
        model=model,
        optimizer=LARS(model.parameters(), lr=1.0),
        comm=LocalComm(),
        reducer=None,
        plan=make_plan(Config(batch_size=8, micro_batch=4, guard=guard), 1, 64, 8),
        device=torch.device("cpu"),
        autocast=None,
        scaler=torch.amp.GradScaler("cpu", enabled=scaler),
        seed=0,
        clip_norm=clip_norm,
    )


def batch(value: float = 1.0) -> engine.Batch:
    return torch.full((4, 3, 2, 2), value), torch.arange(4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    job, counts = job_of(), Counts(torch.device("cpu"))
    engine.train_step(job, iter([batch(), batch()]), 0, counts, engine.Clock())
    weights, sums = [p.clone() for p in job.model.parameters()], counts.sums.clone()
    norm = engine.train_step(job, iter([batch(), batch(value)]), 1, counts, engine.Clock())
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(weights, job.model.parameters(), strict=True))
    assert torch.equal(counts.sums, sums)  # the mean loss of the interval is that of the steps that were taken
    assert math.isfinite(engine.train_step(job, iter([batch(), batch()]), 2, counts, engine.Clock()))


def test_clipping_scales_the_whole_gradient():
    plain, clipped = job_of(), job_of(clip_norm=0.01)
    for job in (plain, clipped):
        engine.train_step(job, iter([batch(), batch(2.0)]), 0, Counts(job.device), engine.Clock())
    assert gradient_norm(clipped.model.parameters()) == pytest.approx(0.01, rel=1e-4)
    ratio = clipped.model[1].weight.grad / plain.model[1].weight.grad
    assert ratio.std() / ratio.mean() < 1e-5


def test_the_gradient_norm_is_the_global_one():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm([a, b]) == 5.0
    assert not_finite([("a", a), ("b", b)]) == []
    b.grad[0] = float("inf")
    assert not_finite([("a", a), ("b", b)]) == ["b"]


def supervisor_of(tmp_path, job, guard, **changes) -> Supervisor:
    return Supervisor(Config(batch_size=8, micro_batch=4, guard=guard, **changes), job, tmp_path, 5)


@pytest.mark.parametrize(("policy", "error"), [("stop", Diverged), ("rollback", RollBack), ("skip", None)])
def test_the_policy_decides(tmp_path, policy, error):
    job = job_of()
    supervisor = supervisor_of(tmp_path, job, Guard(nonfinite=policy, max_skips=2))
    job.model[1].weight.grad = torch.full((5, 12), float("nan"))
    progress = Progress(step=7)
    if error:
        with pytest.raises(error, match="step 7: the gradient of 1.weight is not finite"):
            supervisor.broken(math.nan, progress)
        return
    assert supervisor.broken(1.0, progress) is None
    assert "step 7: the gradient of 1.weight is not finite" in supervisor.broken(math.nan, progress)
    assert supervisor.broken(math.inf, progress)
    with pytest.raises(Diverged, match="3 such steps"):
        supervisor.broken(math.nan, progress)


def test_an_overflow_under_loss_scaling_is_no_fault_until_the_scale_is_gone(tmp_path):
    job = job_of(scaler=True)
    supervisor = supervisor_of(tmp_path, job, Guard())
    assert supervisor.broken(math.inf, Progress()) is None
    job.scaler.scale(torch.ones(1))  # makes its lazy state
    job.scaler.update(0.5)
    with pytest.raises(Diverged, match="loss scale fell below 1"):
        supervisor.broken(math.inf, Progress())


def test_the_loss_scale_reaches_neither_norm_nor_clipping_nor_weights():
    """Unscaled, the gradients are the same numbers; the step takes the multi-tensor path with it, the fused without."""
    results = []
    for scaler in (False, True):
        job = job_of(scaler=scaler, clip_norm=0.01)
        norms = [
            engine.train_step(job, iter([batch(), batch(2.0)]), step, Counts(job.device), engine.Clock())
            for step in range(3)
        ]
        results.append([torch.tensor(norms), *(p.detach() for p in job.model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_fp16_skips_an_overflow_and_lowers_its_scale():
    job = job_of(scaler=True)
    before = [p.clone() for p in job.model.parameters()]
    engine.train_step(job, iter([batch(), batch(float("inf"))]), 0, Counts(job.device), engine.Clock())
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))
    assert job.scaler.get_scale() == 2.0**15


def test_an_overflow_under_loss_scaling_leaves_sums_and_averages_alone():
    job, counts = job_of(scaler=True), Counts(torch.device("cpu"))
    object.__setattr__(job, "ema", Ema(job.model.parameters(), 0.9))
    engine.train_step(job, iter([batch(), batch()]), 0, counts, engine.Clock())
    sums, average = counts.sums.clone(), [t.clone() for t in job.ema.average]
    engine.train_step(job, iter([batch(), batch(float("inf"))]), 3, counts, engine.Clock())
    assert torch.equal(counts.sums, sums)  # or one overflow makes the loss of a whole interval nan
    assert all(torch.equal(a, b) for a, b in zip(average, job.ema.average, strict=True))


@pytest.mark.parametrize(
    ("what", "tensor"), [("checksums", "1.bias"), ("checksums of buffers", "the mean of 2.running_var")]
)
def test_a_sum_that_differs_names_its_tensor(tmp_path, what, tensor):
    """Weights first, then the mean over ranks of BatchNorm's statistics."""

    class Two(LocalComm):
        def gather(self, value, name):
            other = [v + (name == what and i == 1) for i, v in enumerate(value)]
            return [value, other] if name.startswith("checksums") else [value]

    job = job_of()
    job.model.append(torch.nn.BatchNorm1d(5))
    object.__setattr__(job, "comm", Two())
    supervisor = supervisor_of(tmp_path, job, Guard())
    with pytest.raises(Diverged, match=f"step 8: the weights of rank 1 differ from rank 0's, first in {tensor}:"):
        supervisor.compare_replicas(8)


def test_a_loss_that_stays_up_ends_the_run():
    bound = LossBound(3.0, steps=20)
    for step, loss in [(10, 9.0), (20, 2.9), (30, 3.1), (40, float("nan"))]:
        bound.check(loss, step)
    with pytest.raises(Diverged, match="above 3 since step 30 .*at step 50.*raise --guard.max_loss"):
        bound.check(5.0, 50)
    assert default_bound(1000) == pytest.approx(3 * math.log(1000))


def test_the_first_difference_is_named():
    rows = [[1.0, 2.0, 3.0]] * 2 + [[1.0, 2.5, 9.0]]
    assert first_difference(["a", "b", "c"], rows) == ([2], "b")
    assert first_difference(["a"], [[math.nan], [math.nan]]) is None
    assert first_difference([], [[], []]) is None


def test_sums_see_swapped_values_and_tiny_changes():
    a = torch.randn(1000)
    swapped, moved = a.clone(), a.clone()
    swapped[[3, 4]] = a[[4, 3]]
    moved[999] += 1e-6
    assert tensor_sums([a]) == tensor_sums([a.clone()])
    assert tensor_sums([a]) != tensor_sums([swapped])
    assert tensor_sums([a]) != tensor_sums([moved])


def test_sums_in_blocks_are_those_of_the_whole(monkeypatch):
    tensors = [torch.arange(50.0).view(5, 10), torch.ones(7), torch.ones(()), torch.ones(0)]
    whole = tensor_sums(tensors)
    assert whole == [sum(i * (i + 1) for i in range(50)), 28.0, 1.0, 0.0]
    monkeypatch.setattr(guards, "BLOCK", 7)
    assert tensor_sums(tensors) == whole


def test_saves_fall_due_by_the_clock(tmp_path, monkeypatch):
    supervisor = supervisor_of(tmp_path, job_of(), Guard(), resume=Resume(save_minutes=1.0))
    supervisor.note()
    assert supervisor.agreed() == (False, False)
    supervisor.saved_at -= 61
    supervisor.note()
    assert supervisor.agreed() == (False, True)
    (tmp_path / "STOP").touch()
    supervisor.note()
    assert supervisor.agreed()[0]
    assert supervisor.stopped(5).reason == "file STOP"
    assert not (tmp_path / "STOP").exists()


def test_a_time_limit_leaves_room_for_steps_an_evaluation_and_a_save(tmp_path, monkeypatch):
    """Two steps may pass before all ranks have heard, an epoch may end there; what went before counts once."""
    supervisor = supervisor_of(tmp_path, job_of(), Guard(), max_time="60")
    now = supervisor.noted_at
    monkeypatch.setattr(time, "monotonic", lambda: now)
    supervisor.note()
    now += 5  # a step
    supervisor.agreed()
    now += 100  # evaluated and saved: no step
    supervisor.evaluated(70)
    supervisor.saved(30)
    supervisor.note()
    needed = 3 * 5 + 70 + 2 * 30 + MARGIN
    for left, reason in ((needed + 1, None), (needed - 1, "time limit")):
        supervisor.notes.deadline = time.time() + left
        assert supervisor._reason() == reason


def test_the_report_names_the_slowest_rank(tmp_path):
    class Three(LocalComm):
        size = 3

        def sum(self, values):
            busy, seconds = values["busy.0"], clock.since - began
            return {**values, "busy.1": busy * 3, "busy.2": busy, "waited.1": seconds / 2}

    job = job_of()
    log = runlog.RunLog(tmp_path, tensorboard=False, progress=False)
    log.hosts = ["n1", "n2", "n2"]
    counts, clock = Counts(job.device), engine.Clock()
    began = clock.since
    engine.train_step(job, iter([batch(), batch()]), 0, counts, clock)
    object.__setattr__(job, "comm", Three())
    engine.report(job, 1, 0.1, math.nan, counts, clock, log)
    (line,) = runlog.read(tmp_path, "train")
    assert line["slowest_rank"] == 1
    assert line["slowest_host"] == "n2"
    assert line["slowest_ratio"] == pytest.approx(3.0, rel=1e-6)
    assert line["slowest_data_wait"] == pytest.approx(0.5, rel=0.01)
    assert line["data_wait"] == pytest.approx(0.5 / 3, rel=0.01)
    assert line["gradient_norm"] is None
    assert line["count"] == 8
