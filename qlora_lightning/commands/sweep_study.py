"""Trials of a sweep: an Optuna study that any number of processes take them from, each a fit in its own process."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from qlora_lightning.callbacks.run_folder import refuse_links
from qlora_lightning.commands.sweep_trials import PRUNES_AFTER, REMEDY, Plan, Planned, Range, Space, Trial, combinations
from qlora_lightning.report import read_run
from qlora_lightning.report.figures import find_figures
from qlora_lightning.report.run_files import read_metrics
from qlora_lightning.support.console import count_of, say
from qlora_lightning.support.errors import Diverged, TrainingStopped, UserError
from qlora_lightning.support.files import METRICS

_JOURNAL, _LOCK = "study.journal", "sweep.lock"
_DIVERGED = 3  # exit code of a trial's process
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_MAX_SAMPLES = 10  # that may be repeats of earlier ones, before the first untried values are taken


Prune = Callable[[Sequence[float]], bool]
"""Takes the validation losses of a trial so far, and returns whether to end it."""
Train = Callable[[Planned, Mapping[str, Any], Prune], Trial]
"""Trains a trial with settings."""


class Trials:
    """The trials of a sweep, in an Optuna study in its folder.

    Any number of processes, on machines that share the disk, take trials from it. Optuna's journal has no heartbeat:
    a process holds a lock on a file in the folder of its trial instead, which a kill releases.

    Args:
        folder: Where the journal is, and a folder for each trial.
        space: The keys that trials set.
        seed: Of the values that are drawn.
    """

    def __init__(self, folder: Path, space: Space, seed: int) -> None:
        self.folder, self.space, self.seed = folder, space, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line of ours reports each trial
        refuse_links(journal := folder / _JOURNAL)
        folder.mkdir(parents=True, exist_ok=True)
        storage = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
        self.study = optuna.create_study(
            study_name=folder.name,
            storage=optuna.storages.JournalStorage(storage),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNES_AFTER),
            load_if_exists=True,
        )
        self._distributions = {key: _distribution(values) for key, values in space.items()}

    def run(self, plan: Plan, train: Train) -> dict[str, Trial]:
        """Train what is wanted until nothing is, whichever process trains it; return all trials by name."""
        waits = False
        while (taken := self._take(plan)) is not None or self._running():
            if taken is None:
                if not waits:
                    say(f"Waiting for {count_of(len(self._running()), 'trial')} of other processes.")
                waits = True
                time.sleep(1)
                continue
            waits = False
            planned, trial, lock = taken
            try:
                result = train(planned, trial.params, _reporter(trial))
                for name in ("parameters", "minutes"):
                    trial.set_user_attr(name, getattr(result, name))
                if result.pruned:
                    self.study.tell(trial, state=TrialState.PRUNED)
                else:
                    self.study.tell(trial, result.val_loss)
            except BaseException:  # a signal too: the next process continues it
                self.study.tell(trial, state=TrialState.FAIL)
                raise
            finally:
                lock.release()
        return self.ended()

    def ended(self) -> dict[str, Trial]:
        """Return the trials that have ended, by name, in the order in which they were begun."""
        found = {}
        for trial in self.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
            attributes, pruned = trial.user_attrs, trial.state == TrialState.PRUNED
            name, value = attributes["name"], math.inf if trial.value is None else trial.value
            figures = attributes["parameters"], value, attributes["minutes"]
            found[name] = Trial(name, trial.params, *figures, pruned)
        return found

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(states=(TrialState.RUNNING,))

    def _take(self, plan: Plan) -> tuple[Planned, optuna.Trial, FileLock] | None:
        """Begin the first trial that is wanted and that no process has; ``None`` if there is none now."""
        with FileLock(self.folder / _LOCK):  # one process at a time looks and takes
            while self.study.get_trials(states=(TrialState.WAITING,)):  # of a process that was killed here
                self.study.tell(self.study.ask(), state=TrialState.FAIL)
            for lost in self._running():
                if "name" not in lost.user_attrs or not _is_locked(self.folder / lost.user_attrs["name"] / _LOCK):
                    self.study.tell(lost.number, state=TrialState.FAIL)
            begun, failed = self._by_name(failed=False), self._by_name(failed=True)
            planned = next((each for each in plan(self.ended()) if each.name not in begun), None)
            if planned is None:
                return None
            settings = planned.settings
            if settings is None and (source := begun.get(planned.repeats) or failed.get(planned.name)):
                settings = source.params
            lock_file = self.folder / planned.name / _LOCK
            refuse_links(lock_file.parent)
            lock_file.parent.mkdir(exist_ok=True)
            lock = FileLock(lock_file)
            lock.acquire(timeout=0)
            trial = self._draw(begun) if settings is None else self._ask(settings)
            trial.set_user_attr("seed", planned.seed)
            trial.set_user_attr("name", planned.name)
        return planned, trial, lock

    def _by_name(self, failed: bool) -> dict[str, FrozenTrial]:
        trials = [trial for trial in self.study.get_trials() if "name" in trial.user_attrs]
        return {each.user_attrs["name"]: each for each in trials if (each.state == TrialState.FAIL) is failed}

    def _ask(self, settings: Mapping[str, Any]) -> optuna.Trial:
        self.study.enqueue_trial(dict(settings))
        return self.study.ask(self._distributions)

    def _draw(self, begun: Mapping[str, FrozenTrial]) -> optuna.Trial:
        """Begin a trial with values that no other has."""
        tried = [trial.params for trial in begun.values()]
        for number in range(_MAX_SAMPLES):
            # by its number, so that a sweep that was killed draws what it would have drawn
            self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(begun) + 1_000 * number)
            trial = self.study.ask(self._distributions)
            if trial.params not in tried:
                return trial
            self.study.tell(trial, state=TrialState.FAIL)
        return self._ask(next(settings for settings in combinations(self.space) if settings not in tried))


def _distribution(values: Range | Sequence[Any]) -> BaseDistribution:
    """Return Optuna's distribution: by orders of magnitude if both ends of a range are positive."""
    if not isinstance(values, Range):
        return CategoricalDistribution(tuple(values))
    if isinstance(values.low, int):
        return IntDistribution(int(values.low), int(values.high), log=values.low > 0)
    return FloatDistribution(values.low, values.high, log=values.low > 0)


def _reporter(trial: optuna.Trial) -> Prune:
    """Return a function that reports validation losses to Optuna, by their number, and asks its pruner at each."""
    n_reported = 0

    def report(losses: Sequence[float]) -> bool:
        nonlocal n_reported
        for loss in losses[n_reported:]:
            trial.report(loss, n_reported)
            n_reported += 1
            if trial.should_prune():
                return True
        return False

    return report


def _is_locked(file: Path) -> bool:
    """Whether a process holds the lock of a trial."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except FileNotFoundError:  # its folder was deleted
        return False
    lock.release()
    return False


# ---- a trial in a process of its own ---------------------------------------------------------------------------------


def train_trial(
    folder: Path, command: Sequence[str], planned: Planned, settings: Mapping[str, Any], prune: Prune | None
) -> Trial:
    """Train in a process of its own; return its result.

    Args:
        folder: Of the run.
        command: Arguments of ``qlora-lightning`` that train it.
        planned: What is trained.
        settings: The values of its keys.
        prune: Decides whether to end it early; ``None`` never does.

    Raises:
        TrainingStopped: A signal came to this process or to that one.
        UserError: The training failed, which has printed why, or it has no validation.
    """
    code, is_pruned = _run_process(command, folder / METRICS, prune)
    expected = (0, _DIVERGED, 128 + signal.SIGTERM, -signal.SIGTERM) if is_pruned else (0, _DIVERGED)
    if code not in expected:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"The sweep ends at {planned.name}, whose training ended with {reason}: see above. The same command "
            "continues.",
            "sweep.trial",
        )
    result = read_run(folder)
    figures, parameters = find_figures(result), result.manifest["parameters"]["trainable"]
    if code == _DIVERGED:
        loss = math.inf
    elif "val_loss" in figures:
        loss = figures["val_loss"].value
    else:
        raise UserError(f"{folder} ended before its first validation: no loss to compare. {REMEDY}")
    text = f"val_loss {loss:.4f}" if math.isfinite(loss) else "diverged"
    say(f"{planned.name}: {text}{', pruned' if is_pruned else ''}")
    return Trial(planned.name, settings, parameters, loss, figures["minutes"].value, is_pruned)


def _run_process(command: Sequence[str], metrics: Path, prune: Prune | None) -> tuple[int, bool]:
    """Run a trial's process; return its exit code, and whether it was pruned."""
    received: list[int] = []
    try:
        output = sys.stdout.fileno()  # standard error, if the figures go to standard output
    except (AttributeError, OSError):
        output = None
    sys.stdout.flush()
    # the modules of this process, as multiprocessing has it; -P: no other file of the current folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qlora_lightning", *command],
        stdin=subprocess.PIPE,  # it ends when this closes: with this process, however that ends
        stdout=output,
        env=environment,
        start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
    )

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    with process, _handling(pass_on):
        is_pruned, code = False, None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(1 if prune else None)
            if prune and not is_pruned:
                losses = [value for _, value in read_metrics(metrics).get("val_loss", ())]
                # the last loss of a trial that has ended prunes nothing, whenever this looks
                if is_pruned := prune(losses if code is None else losses[:-1]):
                    process.terminate()
    signals = received or ([code - 128] if code > 128 else [])
    if signals and not (is_pruned and not received):
        raise TrainingStopped(128 + signals[0])
    return code, is_pruned


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals that would end this process, unless they are ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it only there
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: earlier for number, earlier in handlers.items() if earlier != signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in handlers.items():
            signal.signal(number, earlier)


def run_trial(holdout_seed: int, arguments: Sequence[str]) -> int:
    """Train in this process, which ends when its standard input does; return the exit code.

    Args:
        holdout_seed: Of the rows that are held out, the same in all trials.
        arguments: Those of ``fit``.
    """
    from qlora_lightning.commands.fit import QLoRACLI

    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    cli = QLoRACLI(arguments, "fit")
    cli.datamodule.holdout_seed = holdout_seed
    try:
        cli.run()
    except Diverged as error:
        say(str(error))
        return _DIVERGED
    return 0


def _stop_at_end_of_input() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a daemon thread would hold at the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
