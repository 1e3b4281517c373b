"""SITE.yaml: the packaged ones load, mistakes end in a sentence that names the key."""

import pytest

from hpcmlip.cluster.site import DEFAULT_FILE, PACKAGE_FOLDER, Site, load_site
from hpcmlip.config import dump, read_yaml
from hpcmlip.errors import ConfigError


def _load(tmp_path, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return load_site(path)


PACKAGED = sorted(path.name for path in PACKAGE_FOLDER.glob("site*.yaml"))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_sites_load(name):
    assert load_site(PACKAGE_FOLDER / name).ranks >= 2


def test_there_is_a_site_for_cpus_and_gpus_with_and_without_a_container():
    sites = {name: load_site(PACKAGE_FOLDER / name) for name in PACKAGED}
    assert {(site.gpus_per_node > 0, site.container is not None) for site in sites.values()} == {
        *((False, False), (False, True)),
        *((True, False), (True, True)),
    }
    for kind in ("cpu", "gpu"):  # the container changes how python starts, and nothing that Slurm is asked for
        plain, inside = (sites[f"site-{kind}{variant}.yaml"] for variant in ("", "-apptainer"))
        assert inside.model_copy(update={"setup": plain.setup, "container": None}) == plain


def test_documented_site_names_every_key_with_its_default():
    assert load_site(DEFAULT_FILE) == Site()
    assert set(read_yaml(DEFAULT_FILE)) == set(Site.model_fields)


def test_site_survives_dump(tmp_path):
    site = load_site(PACKAGE_FOLDER / "site-gpu.yaml")
    assert _load(tmp_path, dump(site)) == site


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: long", "unknown key 'partitoin' (did you mean 'partition'?"),
        ("nodes: 0", "site.yaml: nodes: "),
        ("nodes: two", "got 'two'"),
        ("time: 24:00:00", "write the time in quotes"),
        ('time: "tomorrow"', "time: String should match"),
        ("mem: 64 GB", "mem: String should match"),
        ("account: my project", "account: String should match"),
        ("{tasks_per_node: 4, gpus_per_node: 2}", "one process uses one GPU"),
        ("sbatch_options: [exclusive]", "sbatch_options.0: String should match"),
        ("evaluate: {walltime: '1:00'}", "unknown key 'evaluate.walltime'"),
        ("setup: source /venv/bin/activate", "got 'source /venv/bin/activate'"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    assert said in str(error.value)
    assert "site.yaml" in str(error.value)


def test_ranks_that_do_not_divide_the_micro_batches_are_refused():
    site = Site(nodes=3, tasks_per_node=2)
    site.check_ranks(12)
    with pytest.raises(ConfigError, match=r"3 x 2 = 6 processes a member, which does not divide .*= 8"):
        site.check_ranks(8)


def test_absent_template_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the batch template .*train\.sbatch"):
        Site(templates=tmp_path).template("train.sbatch")


def test_the_evaluation_keeps_what_it_does_not_name():
    site = Site(
        tasks_per_node=4, gpus_per_node=4, cpus_per_task=8, mem="128G", evaluate={"nodes": 1, "time": "1:00:00"}
    )
    asked = site.evaluation
    assert (asked.tasks_per_node, asked.gpus_per_node, asked.cpus_per_task, asked.mem) == (4, 4, 8, "128G")
    assert (asked.nodes, asked.time) == (1, "1:00:00")


def test_a_contradiction_in_the_evaluation_is_told_at_once(tmp_path):
    (tmp_path / "site.yaml").write_text("tasks_per_node: 2\ngpus_per_node: 2\nevaluate: {tasks_per_node: 4}\n")
    with pytest.raises(ConfigError, match="one process uses one GPU"):
        load_site(tmp_path / "site.yaml")
