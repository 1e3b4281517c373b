"""What would fail in the queue, hours later: found before anything is submitted."""

from collections.abc import Iterable

from hpcmlip.cluster.experiment import Experiment
from hpcmlip.cluster.script import Evaluation
from hpcmlip.cluster.site import Site
from hpcmlip.config import DataSection, RunConfig
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.store import SPLITS, open_store
from hpcmlip.errors import ConfigError
from hpcmlip.models.potential import Potential
from hpcmlip.plugins import suggest
from hpcmlip.training import transfer


def check(experiment: Experiment, site: Site, *, local_ranks: int | None) -> None:
    """Raises ConfigError or DataError for configs, data or numbers of processes with which a member would fail.

    `local_ranks`: processes a member on this machine; None for a batch job of the site.
    """
    configs = [experiment.member_config(member) for member in range(len(experiment.members))]
    for micro_batches in {config.train.micro_batches_per_step for config in configs}:
        _check_ranks(micro_batches, site, local_ranks)
    for data in _different_data(configs):
        Dataset.open(data.stores, data.levels).check_labels()
        if experiment.evaluation is not None:
            _check_evaluation(experiment.evaluation, data)
    _check_transfers(configs)
    trained = {str(sorted(config.data.levels.items())) for config in configs}
    if experiment.evaluation is not None and len(trained) > 1:
        raise ConfigError(
            "the members are trained on different levels or labels, which cannot be evaluated together: "
            "leave out --evaluate and evaluate them one by one"
        )


def _different_data(configs: Iterable[RunConfig]) -> list[DataSection]:
    return list({config.data.model_dump_json(): config.data for config in configs}.values())


def _check_ranks(micro_batches: int, site: Site, local_ranks: int | None) -> None:
    if local_ranks is None:
        site.check_ranks(micro_batches)
    elif micro_batches % local_ranks:
        raise ConfigError(
            f"--ranks {local_ranks} does not divide train.micro_batches_per_step = {micro_batches}; change one of them"
        )


def _check_transfers(configs: Iterable[RunConfig]) -> None:
    parts = ("data", "model", "transfer")
    different = {str([getattr(c, part) for part in parts]): c for c in configs if c.transfer is not None}
    for config in different.values():
        potential = Potential(config.model, Dataset.open(config.data.stores, config.data.levels).spec, seed=0)
        transfer.start(potential, config.transfer)
        transfer.freeze(potential, config.transfer)


def _check_evaluation(evaluation: Evaluation, data: DataSection) -> None:
    held = [level.name for level in open_store(evaluation.store).meta.levels]
    if not set(held) & set(data.levels):
        raise ConfigError(f"{evaluation.store} holds {', '.join(held)}, none of the trained {', '.join(data.levels)}")
    if evaluation.split not in SPLITS:
        raise ConfigError(f"there is no split '{evaluation.split}'{suggest(evaluation.split, SPLITS)}")
