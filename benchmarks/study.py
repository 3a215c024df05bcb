"""`python -m benchmarks.study STUDY.yaml`: train every cell of a grid with `dist_lars.train`, and report.

    python -m benchmarks.study benchmarks/studies/digits.yaml
    python -m benchmarks.study benchmarks/studies/lars_vs_sgd.yaml --data.path /data/cifar10 --workers 2
    python -m benchmarks.study benchmarks/studies/lars_vs_sgd.yaml --list       what there is to do, and what it costs
    python -m benchmarks.study benchmarks/studies/lars_vs_sgd.yaml --report     tables and plots of what there is

Each run is a process of its own, `python -m dist_lars.train`, or ranks that `--launch "horovodrun -np 2"` starts. A run
that is finished is a line of benchmarks/records/study-NAME.jsonl and is never repeated, nor is one that another study
of the same images has there; start the same command again after any interruption. Several processes, also on several
nodes, may work on one study: they take what is free. Ctrl-C lets runs save and stop, a second one ends them. Options of
the trainer (`--epochs 2`, `--data.workers 4`) hold for every run. docs/evidence.md tells how to write a study of your
own.
"""

import argparse
import difflib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from benchmarks import record, study_grid, study_report, study_store
from dist_lars.cli import make_parser, normalise
from dist_lars.config import data_path, from_flat
from dist_lars.errors import UserError
from dist_lars.launchers import expected_ranks
from dist_lars.locks import lock
from dist_lars.resources import cores, pick_autocast, pick_device
from dist_lars.runlog import read_status
from dist_lars.stopping import EXIT_STOPPED

POLL = 5.0  # seconds between two looks at what other processes have done
HOPELESS = 3  # failures without a single success: the study is wrong, not the runs
NEVER = 10**6  # seconds: a run that gets no CPU for an hour is not hanging


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then report; exit code 1 if a run failed, 75 if it was stopped."""
    runner = None
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    try:
        study = study_grid.load(args.study, "data.path" in overrides, overrides)
        store = study_store.Store(args.records, study.name, shared=args.of > 1)
        if args.list:
            here = "data.path" in overrides or "DIST_LARS_DATA" in os.environ  # else any images will do
            asked = header(study) if here else study_report.header(study)
            others = {name: line for name, (line, _) in store.elsewhere(asked).items()}
            shipped = study_store.Store(record.RECORDS, study.name).runs()
            print(study_report.to_do(study, others | store.runs(), shipped))
            return
        code = 0
        if args.report:
            study_report.refuse_other_options(study, store)
        else:
            refuse_what_cannot_run(study)
            runner = Runner(study, store, args)
            code = runner.go()
        if store.runs():
            print(study_report.write(study, store))
            print(f"report: {store.path.with_suffix('.md')}, its plots beside it; records: {store.path}", flush=True)
        elif args.report:
            print(f"no run is recorded in {store.path} yet: the same command without --report trains them")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        for line in runner.last_words() if runner else []:
            print(line, file=sys.stderr)
    raise SystemExit(code)


def header(study: study_grid.Study) -> dict[str, Any]:
    """What the records say of the study, with its images as they are here."""
    configs = [from_flat(cell.options) for cell in study_grid.cells(study)]
    folders = {(data_path(config), config.data.val): config for config in configs}  # mostly one
    names = [study_store.names_of_files(config) for config in folders.values()]
    return study_report.header(study, names[0])


def refuse_what_cannot_run(study: study_grid.Study) -> None:
    """Say once and now, not in the log of each run, that ranks do not share a batch; of images, `header` does.

    $DIST_LARS_RANKS says how many ranks there will be, as slurm/study.sbatch sets it.
    """
    ranks, _ = expected_ranks({"DIST_LARS_RANKS": os.environ.get("DIST_LARS_RANKS", "")})
    for cell in study_grid.cells(study):
        try:
            study_grid.plan_of(cell.options, ranks or 1)
        except UserError as e:
            raise UserError(f"{cell.key}: {e}") from e


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(our own options, those of the trainer)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path, help="a STUDY.yaml")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time on this machine (1)")
    parser.add_argument("--launch", default="", help='what starts the ranks of a run, e.g. "horovodrun -np 2"')
    parser.add_argument("--task", type=int, default=0, help="of an array job: begin with every OF-th run from here")
    parser.add_argument("--of", type=int, default=1, help="tasks of the array job")
    parser.add_argument(
        "--records", type=Path, default=record.RECORDS, help="folder of records and reports (benchmarks/records)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="folder of the runs, removed when recorded (runs)"
    )
    parser.add_argument("--keep", action="store_true", help="leave run directories, with their checkpoints")
    parser.add_argument("--max_runs", type=int, default=10**9, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("--report", action="store_true", help="write the report of what there is, and stop")
    args, rest = parser.parse_known_args(argv)
    if not 0 <= args.task < args.of:
        parser.error(f"--task {args.task} --of {args.of}: tasks of N are 0 to N - 1")
    for name in ("workers", "max_runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but it must be at least 1")
    ours = [f"--{name}" for name in vars(args) if name != "study"]
    for word in filter(lambda w: w.startswith("--"), rest):  # before the trainer's are searched for something like it
        if close := difflib.get_close_matches(word.partition("=")[0], ours, cutoff=0.85):
            parser.error(f"unknown option {word}; did you mean {close[0]}?")
    try:
        words = normalise(rest, make_parser("study", ""))
    except UserError as e:
        parser.error(str(e))
    return args, dict(_pairs(words, parser))


def _pairs(words: list[str], parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    found, left = [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        value = value if equals else next(left, "")
        if not name.startswith("--") or not value:
            parser.error(f"{word}: options of the trainer are written --key value")
        found.append((name[2:], value))
    return found


def _once(runs: list[study_grid.Run]) -> list[study_grid.Run]:
    return list({run.id: run for run in runs}.values())


def _words(run: study_grid.Run) -> str:
    return f"{run.cell.key}, {run.stage}, {run.factor:g} x, seed {run.seed}"


class Runner:
    """Threads that each take the next free run, train it in a process and record it."""

    def __init__(self, study: study_grid.Study, store: study_store.Store, args: argparse.Namespace) -> None:
        self.study, self.store, self.args = study, store, args
        self.work = args.work / f"study-{study.name}"
        self.header = header(study)
        study_store.refuse_other_files(store.path, store.lines(), self.header)
        study_report.refuse_other_options(study, store)
        store.make()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--work {args.work} cannot be written: {e.strerror}") from e
        self.known: set[str] = set()  # runs, by now
        self.changed = threading.Condition()
        self.mine: dict[str, IO[Any]] = {}  # run -> its lock
        self.processes: dict[str, int] = {}  # run -> its process, and process group
        self.failed: dict[str, str] = {}  # run -> why
        self.stop, self.started, self.recorded = "", 0, 0
        self.hopeless = self.enough = False
        self.broken: BaseException | None = None
        # Named once: the clone may change while the study runs.
        precision = study.base.get("precision", "auto")
        number = pick_autocast(precision, pick_device(study.base.get("device", "auto"), 0))
        self.machine = study_store.machine("fp32" if number is None else str(number).removeprefix("torch."))

    def go(self) -> int:
        """Work until nothing is left that could be done; the exit code."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        # What the caller ignores (nohup, a script's &) stays ignored.
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._hear)
        workers = [threading.Thread(target=self._work) for _ in range(self.args.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(1.0)  # a join without limit would keep signals waiting
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.broken:
            raise self.broken
        return EXIT_STOPPED if self.stop and not self.hopeless else int(bool(self.failed))

    def last_words(self) -> list[str]:
        """What is to be read last, below the report."""
        lines = [f"failed: {why}; the whole log: {self.work / name}.log" for name, why in self.failed.items()]
        if self.hopeless:
            lines.append(f"given up, for the first {HOPELESS} runs failed")
        elif self.stop:
            lines.append(f"stopped ({self.stop}); the same command goes on from here")
        elif self.enough:
            lines.append(f"stopped after --max_runs {self.args.max_runs}; the same command goes on from here")
        return lines

    def _ask_to_stop(self, why: str) -> None:
        # No lock: this may interrupt a thread that holds it.
        self.stop = self.stop or why
        for name in list(self.mine):
            if (self.work / name).is_dir():
                with suppress(OSError):  # recorded and removed just now
                    (self.work / name / "STOP").touch()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        why, again = signal.Signals(number).name, bool(self.stop) and number == signal.SIGINT
        self._ask_to_stop(why)
        if again:  # only this one: batch systems send the others more than once
            for process in list(self.processes.values()):
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
        said = (
            "ended, their last checkpoints stay" if again else "runs save and stop at their next step; again: at once"
        )
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"{why}: {said}\n".encode())  # print may be the one that is interrupted

    def _work(self) -> None:
        try:
            while run := self._next():
                self._train(run)
        except BaseException as e:  # a thread's error would be lost
            self.broken = e
            self._ask_to_stop("an error")

    # --- taking a run -------------------------------------------------------------------------------------------------

    def _next(self) -> study_grid.Run | None:
        """The first run that is neither done nor taken; waits while others may open up new ones."""
        with self.changed:
            while not self.stop:
                done = self.store.runs()
                known = study_grid.runs(self.study, done)
                self.known = {run.id for run in known}
                missing = [run for run in _once(known) if run.id not in done and run.id not in self.failed]
                if not missing:
                    return None
                if self._shared(missing):  # which may open up others
                    continue
                if self.started >= self.args.max_runs:
                    self.enough = True
                    return None
                for run in self._own_first(missing):
                    if run.id not in self.mine and self._claim(run):
                        self.started += 1
                        return run
                if len({run.cell.key for run in known if run.stage == "final"}) == len(study_grid.cells(self.study)):
                    return None  # others train what is left, and no rate is still to be chosen
                self.changed.wait(POLL)
            return None

    def _shared(self, missing: list[study_grid.Run]) -> bool:
        """Take over the runs that another study has recorded: the same options compute the same."""
        others = self.store.elsewhere(self.header)
        found = [run for run in missing if run.id in others and run.id not in self.mine]
        for run in found:
            self.store.share(run, *others[run.id], self.header)
            self._say(run, "taken from another study's records")
        return bool(found)

    def _own_first(self, missing: list[study_grid.Run]) -> list[study_grid.Run]:
        task, of = self.args.task, self.args.of
        return [run for shift in range(of) for run in missing[(task + shift) % of :: of]]

    def _claim(self, run: study_grid.Run) -> bool:
        """Lock a run, against other processes too; the trainer inherits the lock, which ends with the last of us."""
        try:
            held = lock(self.work / f"{run.id}.lock", needed=self.args.of > 1)
        except BlockingIOError:
            return False
        if run.id in self.store.runs():  # another process has finished it since we looked
            held.close()
            return False
        self.mine[run.id] = held
        return True

    # --- training it --------------------------------------------------------------------------------------------------

    def _train(self, run: study_grid.Run) -> None:
        study_store.refuse_other_precision(self.store.path, self.store.lines(), self.machine)
        folder = self.work / run.id
        folder.mkdir(exist_ok=True)
        options = {"resume.keep": 1, "guard.hang_seconds": NEVER, **run.options, "name": self.study.name}
        study_store.options_file(self.work / f"{run.id}.yaml", options)
        words = [sys.executable, "-m", "dist_lars.train", "--config", str(self.work / f"{run.id}.yaml")]
        for stale in ("STOP", "status.json"):  # of an earlier process
            (folder / stale).unlink(missing_ok=True)
        if self.stop:  # it came before there was a folder to tell the run by
            self._release(run)
            return
        self._say(run, "starts")
        code, seconds = self._launch([*shlex.split(self.args.launch), *words, "--run_dir", str(folder)], run)
        status = read_status(folder) or {}
        finished = code == 0 and status.get("state") == "finished"  # launchers that lose a host may end with 0, too
        if finished or str(status.get("reason")).startswith("Diverged"):
            line = study_store.summary(run, folder, seconds)
            self.recorded += 1
            self.store.add(line, self.machine, self.header)
            came_to = f"top-1 {line['top1']}" if line["top1"] is not None else f"diverged at step {line['step']}"
            done = len(self.known & set(self.store.runs()))
            self._say(run, f"{came_to} ({done} of {len(self.known)} runs that are known by now)")
            self._forget(run)
        elif status.get("state") == "stopped":
            self.stop = self.stop or str(status.get("reason"))
        elif self.stop and code == -signal.SIGKILL:  # by the second Ctrl-C
            pass
        else:
            output = (self.work / f"{run.id}.log").read_text(encoding="utf-8", errors="replace").strip()
            self._set_aside(run.id, f"{_words(run)}: exit code {code}: {output[-600:]}")
        self._release(run)

    def _release(self, run: study_grid.Run) -> None:
        with self.changed:
            self.mine.pop(run.id).close()
            self.changed.notify_all()

    def _launch(self, words: list[str], run: study_grid.Run) -> tuple[int, float]:
        """Exit code, and seconds of CPU that the run's processes and their children took so far."""
        root = str(Path(__file__).parent.parent)
        env = dict(os.environ)
        if not self.args.launch:  # ranks share the cores of their nodes themselves
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.args.workers)))
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
        with (self.work / f"{run.id}.log").open("a") as log:
            process = subprocess.Popen(
                words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                pass_fds=[self.mine[run.id].fileno()],
                process_group=0,  # a terminal's Ctrl-C is for us: the run is told by its STOP file, and saves
            )  # fmt: skip
            self.processes[run.id] = process.pid
            if self.stop:  # it came since we looked
                self._ask_to_stop(self.stop)
            _, status, usage = os.wait4(process.pid, 0)
            del self.processes[run.id]
        process.returncode = os.waitstatus_to_exitcode(status)
        told = self.work / run.id / "cpu_seconds"  # a line for each process: a run that was stopped has several
        with told.open("a") as file:
            file.write(f"{usage.ru_utime + usage.ru_stime}\n")
        return process.returncode, sum(map(float, told.read_text().split()))

    def _forget(self, run: study_grid.Run) -> None:
        for suffix in (".yaml", ".log"):  # not its lock, which another process may hold by now
            (self.work / f"{run.id}{suffix}").unlink(missing_ok=True)
        if not self.args.keep:
            shutil.rmtree(self.work / run.id, ignore_errors=True)

    def _set_aside(self, name: str, why: str) -> None:
        with self.changed:
            self.failed[name] = why
            if len(self.failed) == HOPELESS and not self.recorded:
                self.hopeless = True
                self._ask_to_stop("no hope")
            self.changed.notify_all()

    def _say(self, run: study_grid.Run, what: str) -> None:
        print(f"{run.id} {_words(run)}: {what}", flush=True)


if __name__ == "__main__":
    main()
