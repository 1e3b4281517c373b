"""The order of a training run, from the launch to the record of its end.

Everything that depends on the clock, a signal or a disk is decided on one rank and shared, so that the ranks take
every branch together; everything that enters the numbers follows from the config, the data and the step.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from hpcmlip import dist, launch
from hpcmlip.config import MODEL_LIMITS, RunConfig
from hpcmlip.data.dataset import Dataset
from hpcmlip.errors import EXIT_RESUMABLE, ConfigError, RunError
from hpcmlip.launch import World
from hpcmlip.models.potential import Potential
from hpcmlip.trackers import FINISHED, STOPPED
from hpcmlip.training import checkpoint, run_log, rundir, setup, transfer
from hpcmlip.training.average import Average
from hpcmlip.training.engine import Engine, MicroBatch, StepResult
from hpcmlip.training.objective import Objective
from hpcmlip.training.records import Progress, Records
from hpcmlip.training.reporting import Reporter
from hpcmlip.training.schedules import Position, is_exhausted, rate
from hpcmlip.training.stacks import Stacks
from hpcmlip.training.stopping import Signals, StopRequests
from hpcmlip.training.validation import validate

log = logging.getLogger(__name__)

_SOURCES_NAMED = 10


WhyStop = Callable[[], str | None]
"""Asked on one rank after a validation, with the metrics on disk: why the run is not worth going on, None if it is."""


def train(config: RunConfig, run_dir: Path, signals: Signals, why_stop: WhyStop | None = None) -> int:
    """Train to the end, or until asked to stop; returns the exit code: 0 finished or, by `why_stop`, pruned, 75 stopped
    and resumable.

    Continues from the newest sound checkpoint in `run_dir`. Raises UserError for what the user can act on.
    """
    world = launch.detect()
    setup.check_ranks(config, world)
    device = setup.choose_device(config.engine.device, world)
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            run_log.set_up(run_dir, world.rank)
            seconds = 60 * config.engine.timeout_minutes
            stacks = stack.enter_context(Stacks(run_dir, world.rank, seconds=seconds, alone=world.size == 1))
        except OSError as error:
            raise ConfigError(f"cannot write into {run_dir} ({error.strerror}); give another --run-dir") from None
        stack.push(lambda kind, error, trace: run_log.note_failure(error) if error else None)
        stack.enter_context(_contact(world, stacks))
        dist.start(world, folder=run_dir, device=device, timeout_minutes=config.engine.timeout_minutes)
        stack.callback(dist.stop)
        dist.share_cores()
        with dist.together("opening the run directory"):
            finished = None
            if world.rank == 0:
                finished = stack.enter_context(rundir.RunDirectory(run_dir, config)).finished or rundir.pruned(run_dir)
                checkpoint.mend(run_dir / rundir.CHECKPOINTS)
        finished = dist.broadcast(finished)
        if finished:
            log.info(
                "%s is %s already: %s after step %d",
                *(run_dir, *(finished[key] for key in ("state", "reason", "step"))),
            )
            return 0
        stacks.clear()
        requests = StopRequests(signals, run_dir, seconds_left=_seconds_left(world))
        code = EXIT_RESUMABLE
        if not _leaves_before_the_first_step(requests, world):
            training = Training(config, run_dir, world, device, requests, why_stop=why_stop, rearm=stacks.rearm)
            code = training.run()
        # launchers take the first process to leave with 75 for a failure and end the others
        dist.barrier()
        return code


@contextmanager
def _contact(world: World, stacks: Stacks) -> Iterator[None]:
    """A collective that fails because of another rank ends this one with a sentence."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_lost_contact(error):
            raise
        stacks.add(error)
        raise RunError(
            f"rank {world.rank} lost contact with another rank, whose own message tells why; if that one hangs, "
            f"{stacks.hint} ({error})"
        ) from error


def _seconds_left(world: World) -> float | None:
    """Until the job ends, as rank 0 sees it: clocks of machines differ."""
    end = launch.job_end() if world.rank == 0 else None
    return dist.broadcast(None if end is None else end - time.time())


def _leaves_before_the_first_step(requests: StopRequests, world: World) -> bool:
    """Has a rank been asked to stop while all were starting up? A collective."""
    requests.is_requested(look_for_file=world.rank == 0)
    reason = next(filter(None, dist.gather(requests.reason)), "")
    if reason:
        log.info("stopped on request (%s) before the first step of this start; start again to go on", reason)
        if world.rank == 0:
            requests.forget_file()
    return bool(reason)


class Training:
    """What a run consists of, and its steps in order."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        world: World,
        device: torch.device,
        requests: StopRequests,
        *,
        why_stop: WhyStop | None = None,
        rearm: Callable[[], None] = lambda: None,
    ):
        """`rearm` is called wherever the run is seen to move."""
        self.config, self.run_dir, self.world, self.requests, self._rearm = config, run_dir, world, requests, rearm
        self.why_stop, self.is_judged, self.is_pruned = why_stop, dist.broadcast(why_stop is not None), False
        goes_on = dist.broadcast(bool(checkpoint.steps(run_dir / rundir.CHECKPOINTS)))
        with dist.together("opening the data"):
            self.dataset = Dataset.open(config.data.stores, config.data.levels)
            self.loader = setup.open_loader(config, self.dataset, world)
            potential = Potential(config.model, self.dataset.spec, seed=config.train.seed)
            if config.transfer is not None:
                transfer.freeze(potential, config.transfer)
                if not goes_on:  # its checkpoints hold all the weights
                    transfer.start(potential, config.transfer)
            objective = Objective(potential, config)
        self.engine = Engine(objective, config, world, device)
        if config.engine.compile:
            with dist.together("compiling"):
                potential.compile_forces()
            if any(store.meta.periodic for store in self.dataset.stores):
                log.warning("engine.compile: periodic structures are not compiled")
            rearm()
        self.average = Average(self.engine.parameters(), config.optim.ema_decay)
        self.records = Records(config, run_dir, world, dataset=self.dataset, engine=self.engine, average=self.average)
        self.progress = Progress()
        self.saved_at = time.monotonic()

    def run(self) -> int:
        self.progress = self.records.resume()
        if _leaves_before_the_first_step(self.requests, self.world):
            self.loader.close()
            return EXIT_RESUMABLE
        self._say_what_runs()
        is_first = self.world.rank == 0
        reports = Reporter(
            self.config,
            self.run_dir,
            enabled=is_first,
            first_step=self.progress.step,
            seconds_left=self.requests.seconds_left,
        )
        with reports as reporter, closing(self.loader):
            reason = self._epochs(reporter)
            if reason is None:
                if is_first:
                    self.requests.forget_file()
                self._save(reporter)
                asked = ", ".join(dict.fromkeys(filter(None, dist.gather(self.requests.reason))))
                step = self.progress.step
                log.info("stopped at step %d on request (%s), with a checkpoint; start again to go on", step, asked)
                reporter.ends(STOPPED)
                return EXIT_RESUMABLE
            self._flush(reporter)
            end = self.records.prune if self.is_pruned else self.records.finish
            end(self.progress, reason)
            reporter.ends(FINISHED)
            return 0

    # -------------------------------------------------------------------------------------------------- the epochs

    def _epochs(self, reporter: Reporter) -> str | None:
        """Why the run ended; None if it was asked to stop."""
        while self.progress.epoch < self.config.train.epochs:
            if not self.steps(reporter):
                return None
            reason = self._validation(reporter)
            if reason is not None:
                return reason or None
            self.progress = dataclasses.replace(self.progress, epoch=self.progress.epoch + 1, step_in_epoch=0)
        return f"all {self.config.train.epochs} epochs done"

    def steps(self, reporter: Reporter) -> bool:
        """The rest of the current epoch; False if asked to stop."""
        epoch, first = self.progress.epoch, self.progress.step_in_epoch
        steps = self.loader.steps(epoch)
        waited = self.loader.waited
        began = time.monotonic()
        for micro_batches in self.loader.batches(epoch, first):
            lr = self._rate(steps)
            result = self.engine.step(micro_batches, lr, self._flags(micro_batches, reporter))
            asked_to_stop, save_now, structures, unwritten = result.flags
            if unwritten:
                raise RunError(dist.broadcast(reporter.failure))
            self._count(result)
            if result.applied:
                reporter.step(
                    step=self.progress.step,
                    epoch=epoch + self.progress.step_in_epoch / steps,
                    loss=result.loss,
                    lr=lr,
                    structures=structures,
                    waited=self.loader.waited - waited,
                )
            else:
                self._report_bad_step(micro_batches, reporter)
            waited = self.loader.waited
            self.requests.took(step=time.monotonic() - began)
            if asked_to_stop:
                return False
            if save_now:
                self._save(reporter)
            began = time.monotonic()
        return True

    def _rate(self, steps: int) -> float:
        progress, optim = self.progress, self.config.optim
        position = Position(
            step=progress.step,
            epoch=progress.epoch + progress.step_in_epoch / steps,
            epochs=self.config.train.epochs,
            warmup_epochs=optim.schedule.warmup_steps / steps,
        )
        return rate(optim, position, progress.plateau)

    def _flags(self, micro_batches: list[MicroBatch], reporter: Reporter) -> tuple[float, float, float, float]:
        """(asked to stop, checkpoint due, structures, record of the run unwritten): what the ranks tell each other with
        every step."""
        self._rearm()
        is_first, train = self.world.rank == 0, self.config.train
        due = time.monotonic() - self.saved_at >= 60 * train.checkpoint_minutes
        due = due or (train.checkpoint_steps > 0 and (self.progress.step + 1) % train.checkpoint_steps == 0)
        structures = sum(float(block.weight.sum()) for blocks in micro_batches for block in blocks)
        asked_to_stop = self.requests.is_requested(look_for_file=is_first)
        return float(asked_to_stop), float(is_first and due), structures, float(reporter.failure is not None)

    def _count(self, result: StepResult) -> None:
        if result.applied:
            self.average.update()
        progress = self.progress
        self.progress = dataclasses.replace(
            progress,
            step=progress.step + 1,
            step_in_epoch=progress.step_in_epoch + 1,
            updates=progress.updates + result.applied,
            bad_steps=progress.bad_steps + (not result.applied),
        )

    def _report_bad_step(self, micro_batches: list[MicroBatch], reporter: Reporter) -> None:
        """Name the structures with non-finite numbers; end the run on all ranks if there have been too many."""
        progress = self.progress
        num = sum(len(block.source) for blocks in micro_batches for block in blocks)
        gathered = dist.gather((num, self.engine.bad_sources(micro_batches)))
        found = [source for _, sources in gathered for source in sources]
        if 2 * len(found) > sum(count for count, _ in gathered):
            found = []  # it is the weights that have diverged, not a few records
        names = [self._source_name(source) for source in found[:_SOURCES_NAMED]]
        reporter.bad_step(step=progress.step, epoch=progress.epoch, sources=names, count=progress.bad_steps)
        if progress.bad_steps > self.config.train.max_bad_steps:
            shown = "; ".join(names) or "not a few structures but the weights: lower optim.lr or set optim.clip_norm"
            raise RunError(
                f"{progress.bad_steps} steps had non-finite numbers, more than train.max_bad_steps = "
                f"{self.config.train.max_bad_steps}; at step {progress.step}: {shown}"
            )

    def _source_name(self, source: tuple[int, ...]) -> str:
        store, file, group, row = source
        return f"{self.dataset.stores[store].meta.sources[file].name}, group {group}, row {row}"

    def _flush(self, reporter: Reporter) -> None:
        with dist.together("writing the metrics"):
            reporter.flush()

    def _save(self, reporter: Reporter) -> None:
        began = time.monotonic()
        self._flush(reporter)
        self.records.save(self.progress)
        self.saved_at = time.monotonic()
        self.requests.took(save=self.saved_at - began)
        self._rearm()

    # -------------------------------------------------------------------------------------------------- validation

    def _validation(self, reporter: Reporter) -> str | None:
        """Validate where the epoch asks for it. None: go on; else why the run ends, "" for a request to stop."""
        progress, train = self.progress, self.config.train
        is_last = progress.epoch + 1 == train.epochs
        if progress.validated_step == progress.step:  # before the checkpoint that the run goes on from
            return self._why_stop()
        if not (is_last or (progress.epoch + 1) % train.validate_every == 0):
            return None
        with self.average.in_place():
            result = validate(
                self.engine.objective,
                self.dataset,
                self.config,
                self.world,
                is_stopping=self._is_stopping,
                watch=reporter.watch_validation,
            )
            if result is None:
                return ""
            is_best = result.objective < progress.plateau.best
            plateau = progress.plateau.after(result.objective, self.config.optim.schedule)
            self.progress = dataclasses.replace(progress, plateau=plateau, validated_step=progress.step)
            if is_best:
                best = {"step": progress.step, "epoch": progress.epoch, "objective": result.objective}
                self.progress = dataclasses.replace(self.progress, best=best)
                self.records.export(self.progress)
        reporter.validation(
            step=progress.step,
            epoch=progress.epoch,
            objective=result.objective,
            unit=self.engine.objective.unit,
            levels=result.levels,
            is_best=is_best,
        )
        if is_best:
            self._save(reporter)
        elif self.is_judged:
            self._flush(reporter)
        return self._why_stop()

    def _is_stopping(self) -> bool:
        self._rearm()
        return self.requests.is_requested(look_for_file=self.world.rank == 0)

    def _why_stop(self) -> str | None:
        plateau, train = self.progress.plateau, self.config.train
        if is_exhausted(self.config.optim, plateau):
            return f"the learning rate fell below {self.config.optim.schedule.min_lr:g}"
        if train.patience and plateau.since_best >= train.patience:
            return f"{train.patience} validations without improvement"
        if not self.is_judged or self.progress.epoch + 1 == train.epochs:
            return None
        with dist.together("asking whether to go on"):
            reason = self.why_stop() if self.world.rank == 0 else None
        reason = dist.broadcast(reason)
        self.is_pruned = reason is not None
        return reason

    def _say_what_runs(self) -> None:
        config, world, count = self.config, self.world, self.dataset.count
        log.info("in %s", self.run_dir.absolute())
        size = sum(p.numel() for p in self.engine.parameters().values())
        log.info(
            "%s: %s with %d parameters, levels %s; %d structures to train on, %d to validate, %d steps an epoch",
            *(config.name, config.model.kind, size, ", ".join(f"{k} {v}" for k, v in config.data.levels.items())),
            *(count("train"), count("val"), self.loader.steps(0)),
        )
        clip = config.optim.clip_norm or "off"
        log.info(
            "%d rank(s) by %s on %s, %d micro-batches a step, ZeRO stage %d, gradient clipping %s, %s from step %d",
            *(world.size, world.launcher, self.engine.device, config.train.micro_batches_per_step),
            *(config.engine.zero_stage, clip, config.optim.kind, self.progress.step),
        )
        for limit, reason in config.model.limits.items():
            log.warning("%s: %s (%s)", config.model.kind, MODEL_LIMITS[limit], reason)
