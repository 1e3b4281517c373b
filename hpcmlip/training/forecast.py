"""`hpcmlip train --forecast`: what a run will take in time and memory, from its plan and a probe of some steps."""

import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hpcmlip import dist, launch
from hpcmlip.config import RunConfig
from hpcmlip.errors import EXIT_FAILED, ConfigError
from hpcmlip.training import memory, probe, setup
from hpcmlip.training.extrapolation import Cost, Range, num_validations, run_seconds, validation_seconds
from hpcmlip.training.loop import Training
from hpcmlip.training.stopping import Signals, StopRequests

GB = 1e9


def forecast(config: RunConfig, run_dir: Path, signals: Signals, *, as_json: bool) -> int:
    """Print time, hours and memory of the run; returns the exit code, 1 if it will not fit into memory.

    Under the same launcher as the run. Leaves nothing behind; a run that was begun counts from its beginning.
    """
    world = launch.detect()
    setup.check_ranks(config, world)
    device = setup.choose_device(config.engine.device, world)
    folder = next(path for path in run_dir.absolute().parents if path.is_dir())
    with ExitStack() as stack:
        dist.start(world, folder=folder, device=device, timeout_minutes=config.engine.timeout_minutes)
        stack.callback(dist.stop)
        dist.share_cores()
        with dist.together("making a scratch folder"):
            scratch = stack.enter_context(_scratch(folder)) if world.rank == 0 else None
        scratch = Path(dist.broadcast(scratch))
        training = Training(config, scratch, world, device, StopRequests(signals, scratch))
        stack.callback(training.loader.close)
        start_up = time.time() - psutil.Process().create_time()
        measured = probe.run(training)
        found = _summary(training, measured, start_up)
    if world.rank == 0:
        print(json.dumps(found, indent=1)) if as_json else _show(found)
    return 0 if found["fits"] else EXIT_FAILED


def _scratch(folder: Path) -> tempfile.TemporaryDirectory:
    """Beside the run directory: a checkpoint takes as long there."""
    try:
        return tempfile.TemporaryDirectory(dir=folder, prefix=".hpcmlip-forecast-")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); give another --run-dir") from None


def _summary(training: Training, measured: probe.Measured, start_up: float) -> dict:
    """Plain values for the table and for JSON; a collective."""
    config, train, device = training.config, training.config.train, training.engine.device
    step = Cost(measured.steps.work, measured.steps.seconds)
    epoch = step.range(float(step(measured.epoch).sum()))
    validation = Cost(measured.validation.work, measured.validation.seconds)
    validation = validation.range(validation_seconds(validation, measured.validation_epoch))
    steps = len(measured.epoch)
    run = run_seconds(
        train,
        start_up=start_up,
        steps=steps * train.epochs,
        validation=validation,
        epoch=epoch,
        save=measured.checkpoint,
        export=measured.export,
    )
    decoded = measured.bytes_per_atom * measured.epoch[:, 1].sum() / training.world.size
    host = memory.host(extra=int(min(decoded, config.data.cache_mb * 2**20)))
    gpu = memory.gpu(device)
    units = training.world.size if gpu else sum(dist.gather(torch.get_num_threads()))
    return {
        "name": config.name,
        "model": config.model.kind,
        "parameters": sum(p.numel() for p in training.engine.parameters().values()),
        "structures": training.dataset.count("train"),
        "ranks": training.world.size,
        "device": device.type,
        "epochs": train.epochs,
        "steps_per_epoch": steps,
        "validations": num_validations(train),
        "seconds": {
            "start_up": start_up,
            "step_median": statistics.median(step(measured.epoch)),
            "step_slowest": float(step(measured.epoch).max()),
            "epoch": _three(epoch),
            "validation": _three(validation),
            "checkpoint": measured.checkpoint,
            "run": _three(run),
        },
        "processors": {"kind": "GPU" if gpu else "core", "count": units, "hours": _three(run * (units / 3600))},
        "data_wait": measured.waited / float(measured.steps.seconds.sum()),
        "memory": {"machine": _bytes(host), "gpu": _bytes(gpu)},
        "fits": host.fits and (gpu is None or gpu.fits),
        "may_end_sooner": _why_sooner(config),
        "probed_steps": len(measured.steps.seconds),
    }


def _three(number: Range) -> dict:
    return {"expected": number.value, "low": number.low, "high": number.high}


def _bytes(found: memory.Memory | None) -> dict | None:
    return found and {"peak_bytes": found.peak, "limit_bytes": found.limit, "fits": found.fits}


def _why_sooner(config: RunConfig) -> str | None:
    train, schedule = config.train, config.optim.schedule
    reasons = [f"after {train.patience} validations without improvement"] if train.patience else []
    if schedule.kind == "plateau" and schedule.min_lr:
        reasons.append(f"when the learning rate falls below {schedule.min_lr:g}")
    return " or ".join(reasons) or None


# ---------------------------------------------------------------------------------------------------------- in words


def _show(found: dict) -> None:
    seconds, processors = found["seconds"], found["processors"]
    table = Table(title=f"Forecast of {found['name']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("model", f"{found['model']}, {found['parameters']:,} parameters")
    table.add_row("processes", f"{found['ranks']} on {processors['count']} {processors['kind']}(s)")
    table.add_row("structures", f"{found['structures']:,}")
    table.add_row("steps an epoch", f"{found['steps_per_epoch']:,}")
    table.add_row("a step (median)", _duration(seconds["step_median"]))
    table.add_row("wait for data", f"{found['data_wait']:.0%}")
    table.add_row("an epoch", _span(seconds["epoch"]))
    table.add_row("a validation", _span(seconds["validation"]))
    table.add_row("a checkpoint", _duration(seconds["checkpoint"]))
    table.add_row(f"run of {found['epochs']} epochs, {found['validations']} validations", _span(seconds["run"]))
    hours = processors["hours"]
    text = f"{hours['expected']:.3g} ({hours['low']:.3g} to {hours['high']:.3g})"
    table.add_row(f"{processors['kind']}-hours of the run", text)
    for place, memory_ in found["memory"].items():
        if memory_:
            text = f"{memory_['peak_bytes'] / GB:.1f} of {memory_['limit_bytes'] / GB:.1f} GB"
            table.add_row(f"memory of the {'GPU' if place == 'gpu' else place}, largest batch", text)
    console = Console()
    console.print(table)
    for sentence in _sentences(found):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _sentences(found: dict) -> list[str]:
    said = [
        f"From {found['probed_steps']} steps; the range is that of the fastest and the slowest fifth of them, on a "
        "machine as busy as now. No step was kept: the run begins where it stands."
    ]
    if found["may_end_sooner"]:
        said.append(f"The run may end sooner: {found['may_end_sooner']}.")
    if not found["fits"]:
        said.append("The run will NOT fit into memory: lower data.pairs_per_batch or data.cache_mb, or ask for more.")
    return said


def _span(values: dict) -> str:
    return f"{_duration(values['expected'])} ({_duration(values['low'])} to {_duration(values['high'])})"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
