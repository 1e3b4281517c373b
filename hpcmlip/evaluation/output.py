"""What an evaluation leaves: metrics.json, predictions.zarr, plots/ and report.html, complete or not at all.

Everything is written into a folder inside the output folder and then renamed into place; metrics.json goes first and
comes last, so that its presence says that the rest belongs to it.
"""

import json
import logging
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from hpcmlip.config import MODEL_LIMITS
from hpcmlip.data.store import SPLITS, energy_bit, forces_bit, molecules_of_splits
from hpcmlip.errors import RunError
from hpcmlip.evaluation import conformers, overlap, plots, predictions, report, table
from hpcmlip.evaluation.figures import CONFIDENCE
from hpcmlip.evaluation.members import Ensemble, Found, Member
from hpcmlip.evaluation.task import Task

log = logging.getLogger(__name__)

METRICS = "metrics.json"
PREDICTIONS = "predictions.zarr"
PLOTS = "plots"
REPORT = "report.html"
VERSIONS = ("hpcmlip", "torch", "numpy", "zarr", "scipy")


def write(task: Task, found: Found, figures: dict, *, unit: str, partial: Path) -> None:
    """Write all files of an evaluation and print the table; rank 0 only."""
    content = describe(task, found, unit) | figures
    about = zip(map(_about, task.ensemble.members), task.ensemble.settings(), figures["members"], strict=True)
    content["members"] = [{**who, "settings": settings, **own} for who, settings, own in about]
    shapes = predictions.Shapes(len(task.ensemble.members), len(task.levels), len(task.force_levels))
    attributes = {
        "levels": list(task.levels),
        "force_levels": list(task.force_levels),
        "members": [str(m.path) for m in task.ensemble.members],
        "energy_unit": "eV",
        "forces_unit": "eV/Å",
        "store_digest": content["store"]["digest"],
        "split": task.split,
    }
    merged = predictions.merge(partial / "spill", partial / PREDICTIONS, shapes, attributes)
    if merged != content["num_structures"]:
        raise RunError(
            f"{merged} of {content['num_structures']} predictions arrived in {partial}: is --out on a file system "
            "that all nodes see? Evaluate again"
        )
    shutil.rmtree(partial / "spill")
    pairs = conformers.sums(partial / PREDICTIONS, task.dataset.stores[0], task.split, len(task.levels))
    content["conformers"] = conformers.figures(pairs, task.levels, unit)
    runs = [m.path if m.path.is_dir() else m.path.parent for m in task.ensemble.members]
    images = plots.draw(partial / PREDICTIONS, content, runs, partial / PLOTS)
    (partial / REPORT).write_text(report.render(content, images), encoding="utf-8")
    (partial / METRICS).write_text(
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    publish(partial, partial.parent)
    table.show(content, partial.parent)


def describe(task: Task, found: Found, unit: str) -> dict:
    """Sections of metrics.json that say what was evaluated."""
    store = task.dataset.stores[0]
    meta = store.meta
    training = list({item["digest"]: item for m in task.ensemble.members for item in m.info.get("data", [])}.values())
    trained_on = [item["digest"] for item in training]
    is_own = trained_on == [store.digest]
    seen = None if is_own else overlap.trained_on(store, task.split, training)
    return {
        "levels": {},
        "members": [],
        "ensemble": {},
        "unit": unit,
        "confidence": CONFIDENCE,
        "trained": task.ensemble.first.trained,
        "split": {"name": task.split, **meta.split},
        "notes": (notes(task.split, meta.split) if is_own else [elsewhere(seen)])
        + limits(task.ensemble)
        + different_settings(task.ensemble),
        "num_structures": task.dataset.count(task.split),
        "num_molecules": int(molecules_of_splits(store)[:, SPLITS.index(task.split)].sum()),
        "store": {
            "path": str(store.path),
            "name": meta.name,
            "digest": store.digest,
            "schema": meta.schema,
            "num_structures": meta.num_structures,
            "quarantined": meta.quarantined,
            "sources": [{"name": s.name, "size": s.size, "sha256": s.sha256} for s in meta.sources],
        },
        "training_labels": _training_labels(task) if is_own else None,
        "training": _training(task.ensemble.first.info["config"]),
        "trained_on": training,
        "model": task.ensemble.first.info["config"]["model"],
        "left_out": list(found.left_out),
        "versions": {name: metadata.version(name) for name in VERSIONS} | {"python": platform.python_version()},
    }


def notes(split: str, how: dict) -> list[str]:
    """What a reader of the figures must know about a split of the store that was trained on."""
    said = []
    if split == "train":
        said.append("These are errors on the training split: they show the fit, not the accuracy on unseen molecules.")
    elif split == "val":
        said.append("The validation split chose the weights that were kept: errors on it are slightly too good.")
    if how.get("by") == "structure":
        said.append(
            "Split by structure: conformers of one molecule stand in the training and in the held-out part, so these "
            "errors say little about new molecules."
        )
    elif how.get("by") == "formula":
        said.append("Split by formula: no held-out structure shares its composition with a training structure.")
    elif how.get("by") == "molecule":
        said.append("Split by molecule: no conformer of a held-out molecule was trained on.")
    return said


def elsewhere(seen: int | None) -> str:
    """What a reader must know of figures on a store that was not trained on, `seen` as by `overlap.trained_on`."""
    other = "The models were trained on other stores than this one"
    if seen is None:
        return f"{other}, which are no longer there: whether structures of it were trained on was not checked."
    if seen:
        return (
            f"{other}, but {seen} of the structures of this split were trained on: they are the same rows of "
            "the same raw files. The errors show the fit, not the accuracy on unseen molecules."
        )
    return (
        f"{other}. None of these structures is the row of a raw file that was trained on; conformers of trained "
        "molecules, and structures that came by another file, are not looked for."
    )


def _training_labels(task: Task) -> dict[str, dict[str, int]]:
    """{level: {"energy", "forces"}} structures of the training split with labels that the models were trained on."""
    meta = task.dataset.stores[0].meta
    segments = [s for group in meta.groups for s in group.segments if s.split == "train"]

    def count(bit: int) -> int:
        return sum(s.stop - s.start for s in segments if s.labels & bit)

    return {
        level: {
            "energy": count(energy_bit(meta.level_index(level))),
            "forces": count(forces_bit(meta.level_index(level))) if labels == "EF" else 0,
        }
        for level, labels in task.ensemble.first.trained.items()
        if level in task.levels
    }


def _training(config: dict) -> dict:
    """How the models were trained, in a few settings."""
    optim, train = config["optim"], config["train"]
    return {
        "loss": f"{config['loss']['kind']} in {config['loss']['unit']}",
        "optimizer": f"{optim['kind']}, lr {optim['lr']:g}, schedule {optim['schedule']['kind']}",
        "epochs": f"at most {train['epochs']}",
        "micro-batches a step": f"{train['micro_batches_per_step']} of {config['data']['pairs_per_batch']} pairs",
    }


def limits(ensemble: Ensemble) -> list[str]:
    """What the models do not satisfy by design."""
    models = {member.potential.config.kind: member.potential.config for member in ensemble.members}
    return [
        f"Model {kind}: {MODEL_LIMITS[name]} ({reason})."
        for kind, config in models.items()
        for name, reason in config.limits.items()
    ]


def different_settings(ensemble: Ensemble) -> list[str]:
    """What a mean over the trials of a sweep is not."""
    names = list(ensemble.settings()[0])
    if not names:
        return []
    return [
        f"The members differ in {', '.join(names)}, not in their seed alone: means, intervals and the ensemble are "
        "over settings and say nothing of the uncertainty of one of them; compare the members one by one."
    ]


def _about(member: Member) -> dict:
    info = member.info
    return {
        "run": str(member.path),
        "name": info["config"].get("name"),
        "seed": info["config"].get("train", {}).get("seed"),
        "weights_sha256": info["weights_sha256"],
        "best": info.get("best"),
    }


def publish(partial: Path, out: Path) -> None:
    """Rename everything in `partial` into `out`, replacing an earlier evaluation; other files there stay."""
    (out / METRICS).unlink(missing_ok=True)
    for item in sorted(partial.iterdir(), key=lambda path: path.name == METRICS):
        target = out / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    partial.rmdir()
