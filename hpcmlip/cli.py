"""The command line: parses, loads the config, calls one function. Imports inside the commands keep `--help` quick."""

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hpcmlip.errors import ConfigError, UserError

app = typer.Typer(
    name="hpcmlip",
    help="From the ANI data sets to a potential with error bars. A config file may be followed by key=value.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
]


class Scheduler(StrEnum):
    PROCESSES = "processes"
    MPI = "mpi"
    SLURM = "slurm"


class OnBad(StrEnum):
    QUARANTINE = "quarantine"
    FAIL = "fail"


class DataSet(StrEnum):
    ANI_1 = "ani-1"
    ANI_1X = "ani-1x"
    COMP6 = "comp6"


@app.command()
def shard(
    data: Annotated[Path, typer.Argument(metavar="DATA.yaml")],
    overrides: Overrides = None,
    scheduler: Annotated[
        Scheduler, typer.Option(help="Where the work runs: processes of this machine, MPI ranks, Slurm jobs.")
    ] = Scheduler.PROCESSES,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or jobs; default: one per core.")] = None,
    on_bad: Annotated[
        OnBad | None,
        typer.Option(
            help="Bad conformations: leave out and list them (up to 1 %), or end. Default: as DATA.yaml says."
        ),
    ] = None,
):
    """Raw files -> zarr graph store. Run it again after any interruption: it continues."""
    from hpcmlip.preprocess import schedule

    if scheduler is Scheduler.PROCESSES:
        schedule.warm_up()
    from hpcmlip.config import load
    from hpcmlip.preprocess import pipeline
    from hpcmlip.preprocess.config import DataConfig

    settings = [*(overrides or ()), *([f"on_bad={on_bad}"] if on_bad else [])]
    pipeline.shard(load(DataConfig, data, settings), scheduler=scheduler.value, workers=workers)


@app.command()
def fetch(
    dataset: Annotated[DataSet, typer.Argument()],
    to: Annotated[Path, typer.Option(help="Folder for the raw files.")] = Path("raw"),
):
    """Download the public files of a data set; resumes, checks sums."""
    from hpcmlip.preprocess import fetch as fetching

    fetching.fetch(dataset.value, to)


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """What a store holds: counts, sizes, levels, label coverage, offsets, splits, sources."""
    from hpcmlip.data import inspection

    inspection.show(store, as_json=json)


@app.command()
def verify(store: Annotated[Path, typer.Argument(metavar="STORE")]):
    """Re-read everything against the checksums; names each damaged chunk."""
    from hpcmlip.data import inspection

    sys.exit(inspection.verify(store))


@app.command()
def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/NAME, under the current folder.")] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Say the time and memory that it will take, from some steps; no run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="--forecast: machine-readable.")] = False,
):
    """Train; alone or under torchrun, srun, mpirun. Continues by itself if the run directory holds a checkpoint.

    In a run directory of a sweep by Optuna its pruner may end the run, and the sweep is told the result.
    """
    from hpcmlip.training.stopping import Signals

    signals = Signals().listen()  # before the imports that take seconds
    if json and not forecast:
        raise ConfigError("--json says how --forecast prints: give both; a run writes metrics.jsonl by itself")
    from hpcmlip import launch
    from hpcmlip.cluster import trials
    from hpcmlip.config import RunConfig, load
    from hpcmlip.training import loop

    config = load(RunConfig, run, overrides or ())
    run_dir = run_dir or Path("runs") / config.name
    if forecast:
        from hpcmlip.training import forecast as forecasting

        code = forecasting.forecast(config, run_dir, signals, as_json=json)
    else:
        trial = trials.watched(run_dir)
        code = loop.train(config, run_dir, signals, trial and trial.why_stop)
        if trial is not None and code == 0 and launch.detect().rank == 0:
            trial.tell()
    signals.ignore()
    _leave(code)


@app.command()
def submit(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.yaml")] = None,
    overrides: Overrides = None,
    members: Annotated[
        int | None, typer.Option(min=1, help="Size of the ensemble, default 1; members differ in their seed.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="SWEEP.yaml", help="Settings to try instead: grid, random, list or Optuna.")
    ] = None,
    retry: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="In place of RUN.yaml: the members of an experiment that have not finished."),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Evaluate the members on this store afterwards.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split that is evaluated: train, val or test (default).")] = None,
    min_members: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate only if so many have finished (default 1); the report names who has not."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="SITE.yaml",
            help="Account, partition, modules, GPUs or CPUs a node, container; default: the package's site.yaml.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Experiment directory; default: runs/NAME, under the current folder.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run the members here, one after another, without Slurm.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="--local: processes a member.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the scripts, submit nothing.")] = False,
):
    """Train an ensemble or a sweep as a Slurm array job, evaluation as a dependent job."""
    from hpcmlip.cluster import submission
    from hpcmlip.config import RunConfig, load

    how = submission.How(site, local, ranks, dry_run)
    if retry is not None:
        options = {"RUN.yaml": run, "--members": members, "--sweep": sweep, "--evaluate": evaluate, "--split": split}
        options |= {"--min-members": min_members, "--run-dir": run_dir}
        given = [key for key, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"--retry takes everything from the experiment {retry}: leave out {', '.join(given)}")
        sys.exit(submission.retry(retry, how))
    if run is None:
        raise ConfigError("submit needs a RUN.yaml, or --retry DIR for the members of an experiment")
    config = load(RunConfig, run, overrides or ())
    sys.exit(
        submission.submit(
            config,
            run_dir or Path("runs") / config.name,
            members=members,
            sweep_file=sweep,
            evaluate=evaluate,
            split=split,
            min_members=min_members,
            how=how,
        )
    )


@app.command()
def suggest(
    experiment: Annotated[Path, typer.Argument(metavar="DIR", help="Experiment directory of a sweep by Optuna.")],
    trial: Annotated[int, typer.Argument(metavar="NUMBER", help="Its number in the sweep, from 0.")],
):
    """Settings of a trial of a sweep by Optuna, from the results of those before; prints its name.

    What a job of such a sweep begins with. Exit code 75: results are missing on which somebody still works.
    """
    from hpcmlip.cluster import trials

    sys.exit(trials.suggest(experiment, trial))


@app.command()
def status(
    experiment: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Experiment directory that submit made, or the run directory of train."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """One line a member: state, step, best validation, time left, restarts; of failed ones the end of their log.

    Reads files and, while members are unfinished, asks Slurm once which of their jobs still wait or run: a killed job
    writes nothing. If Slurm does not answer within ten seconds, what the files say is shown.
    """
    from hpcmlip.cluster import status as members

    members.show(experiment, as_json=json)


@app.command()
def cancel(experiment: Annotated[Path, typer.Argument(metavar="DIR", help="Experiment directory that submit made.")]):
    """Cancel the jobs of an experiment that wait or run."""
    from hpcmlip.cluster import status as members

    members.cancel(experiment)


@app.command()
def doctor(
    site: Annotated[
        Path | None, typer.Option(metavar="SITE.yaml", help="Compare it with this cluster; default: the package's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """Check machine, environment, this folder and the cluster before the queue does."""
    from hpcmlip.cluster import doctor as doctors

    sys.exit(doctors.diagnose(site, as_json=json))


@app.command()
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or an experiment directory with members.")
    ],
    data: Annotated[Path, typer.Option(metavar="STORE")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, predictions.zarr, plots, report.html.")] = Path(
        "evaluation"
    ),
    units: Annotated[str, typer.Option(help="Energy unit of all figures.")] = "kcal/mol",
    min_members: Annotated[int, typer.Option(min=1, help="Fail, naming who is absent, if fewer have finished.")] = 1,
):
    """Ensemble errors per level of theory with 95 % confidence interval, plots and a report."""
    from hpcmlip.evaluation import ensemble

    ensemble.evaluate(runs, data, split=split, out=out, unit=units, min_members=min_members)


@app.command()
def predict(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL... IN.xyz", help="Run directories (or experiment), then the structures."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Extended XYZ with energies, forces, ensemble spread.")],
    level: Annotated[str | None, typer.Option(help="Level of theory; default: the last of the config.")] = None,
):
    """Energies (eV), forces (eV/Å) and ensemble spread of structures in the formats that ASE reads by itself.

    energy_std and forces_std are standard deviations between models, which 'hpcmlip evaluate' compares with errors.
    Labels of the structures are kept as ref_energy and ref_forces.
    """
    from hpcmlip.evaluation import prediction

    if len(models) < 2:
        raise ConfigError(
            "predict needs at least one model and a file of structures: hpcmlip predict MODEL... IN.xyz -o OUT.xyz"
        )
    prediction.predict(models[:-1], models[-1], out, level=level)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(ctx: typer.Context, name: Annotated[str, typer.Argument(help="A file in hpcmlip/bench/.")] = "--help"):
    """The benchmarks behind the speed claims, peers in the same run. `hpcmlip bench NAME --help`."""
    from hpcmlip import plugins

    if name in ("--help", "-h"):
        for known in plugins.names("bench"):
            typer.echo(f"{known:10} {plugins.find('bench', known).COMPONENT}")
        return
    sys.exit(plugins.find("bench", name).main(ctx.args))


@app.command()
def configs(
    to: Annotated[Path | None, typer.Option(help="Copy them into this folder.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print all keys of the YAML files instead.")] = False,
):
    """List the configs and samples that come with the package, or copy them to work on."""
    from hpcmlip.configs import copy_to, listing

    if keys:
        from hpcmlip import reference

        print(reference.render(), end="")
    elif to is None:
        print("\n".join(listing()))
    else:
        copy_to(to)


def _leave(code: int) -> NoReturn:
    """End this process; one of several without the interpreter's own end, for everything is closed by now.

    The threads of torch.distributed have been seen to abort that end (signal 6) after a finished run.
    """
    from hpcmlip import launch

    if launch.detect().size > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Entry point: a `UserError` becomes its sentence and its exit code."""
    try:
        app()
    except UserError as error:
        print(f"hpcmlip: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
