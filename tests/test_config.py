"""Wrong configs through the real command line: exit code 2, a sentence that names the key. Right ones: round trips."""

import sys
from pathlib import Path

import pytest
import yaml

from hpcmlip import cli, configs
from hpcmlip.config import RunConfig, dump, load
from hpcmlip.errors import ConfigError
from hpcmlip.preprocess.config import DataConfig

RUN = """\
name: mf
data: {stores: [a.zarr], levels: {dz: EF, cc: E}}
model: {kind: hipnn, cutoff: 6.5}
"""
DATA = """\
name: x
reader: ani1x
sources: [a.h5]
out: x.zarr
levels: {cc: {energy: e}}
"""
COMMAND = {RUN: "train", DATA: "shard"}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(text, *overrides)` -> the sentence with which the command line refuses this config."""
    monkeypatch.chdir(tmp_path)

    def run(text, *overrides, command="train", name="c.yaml"):
        if text is not None:
            Path(name).write_text(text)
        monkeypatch.setattr(sys, "argv", ["hpcmlip", command, name, *overrides])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.startswith("hpcmlip: ") and captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err and "pydantic" not in captured.err
        assert [p.name for p in tmp_path.iterdir() if p.name != name] == []
        return captured.err

    return run


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optm.lr=1", "optim"),
        ("data.stors=[x]", "stores"),
        ("model.featurs=3", "features"),
        ("loss.weigths.cc.energy=1", "weights"),
        ("loss.weights.cc.energi=1", "energy"),
        ("loss.weights.dzz.energy=1", "dz"),
        ("optim.schedule.kin=plateau", "kind"),
        ("train.epoch=3", "epochs"),
        ("engine.zero_stag=1", "zero_stage"),
        ("model.kind=hipn", "hipnn"),
    ],
)
def test_a_misspelt_name_in_a_run_config(refused, override, meant):
    assert f"did you mean '{meant}'?" in refused(RUN, override)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("levles={}", "levels"),
        ("levels.cc.enrgy=x", "energy"),
        ("split.sed=1", "seed"),
        ("reader=ani2x", "ani1x"),
    ],
)
def test_a_misspelt_name_in_a_data_config(refused, override, meant):
    assert f"did you mean '{meant}'?" in refused(DATA, override, command="shard")


@pytest.mark.parametrize(
    ("base", "override", "words"),
    [
        (RUN, "optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        (RUN, "optim.lr=yes", "optim.lr: expected a number, got True"),
        (RUN, "optim.lr=-1", "optim.lr: must be greater than 0, got -1"),
        (RUN, "optim.lr=.nan", "optim.lr: expected a finite number"),
        (RUN, "train.epochs=1.5", "train.epochs: expected a whole number, got 1.5"),
        (RUN, "train.epochs=0", "train.epochs: must be greater than or equal to 1, got 0"),
        (RUN, "train.seed=true", "train.seed: expected a whole number, got True"),
        (RUN, "name=no", "name: expected text (quote it"),
        (RUN, "name=a/b", "name: String should match pattern"),
        (RUN, "data.stores=a.zarr", "data.stores: expected a list"),
        (RUN, "data.stores=[]", "data.stores: must not be empty"),
        (RUN, "data.levels={}", "data.levels: must not be empty"),
        (RUN, "data.levels.cc=F", "data.levels.cc: expected 'E' or 'EF', got 'F'"),
        (RUN, "optim=3", "optim: expected a section of keys"),
        (RUN, "optim.betas=[0.9]", "optim.betas.1: this item is missing"),
        (RUN, "engine.zero_stage=3", "engine.zero_stage: stage 3 cannot train forces"),
        (RUN, "loss.unit=kcal", "loss.unit: expected 'eV', 'meV', 'Ha', 'kcal/mol' or 'kJ/mol'"),
        (RUN, "model.lmax=3", "model.lmax: expected 0, 1 or 2, got 3"),
        (RUN, "model=hipnn", "model: expected a section of keys"),
        (RUN, "model={cutoff: 5}", "model.kind is missing"),
        (DATA, "levels.cc.energy=3", "levels.cc.energy: expected text"),
        (DATA, "levels.cc={forces: f}", "the key 'levels.cc.energy' is missing"),
        (DATA, "levels.cc.atomic_energies={Q: 1}", "atomic_energies names ['Q'], which are no element symbols"),
        (DATA, "elements=HCNO", "elements: expected a list"),
        (DATA, "elements=[Xx]", "elements names ['Xx']"),
        (DATA, "cutoff=0", "cutoff: must be greater than 0, got 0"),
        (DATA, "on_bad=skip", "on_bad: expected 'quarantine' or 'fail', got 'skip'"),
        (DATA, "sources=[]", "sources: must not be empty"),
    ],
)
def test_a_wrong_value(refused, base, override, words):
    assert words in refused(base, override, command=COMMAND[base])


@pytest.mark.parametrize(
    ("base", "overrides", "words"),
    [
        (RUN, ["loss.weights={dz: {energy: 0, forces: 0}, cc: {energy: 0, forces: 1}}"], "nothing would be trained"),
        (RUN, ["optim.schedule.min_lr=1"], "optim.schedule.min_lr is 1, not below optim.lr"),
        (RUN, ["train.seed=-1"], "train.seed: must be"),
        (RUN, ["train.seed=99999999999"], "train.seed: must be"),
        (RUN, ["optim.betas=[1.0,0.9]"], "optim.betas"),
        (RUN, ["name=.."], "name: "),
        (RUN, ["loss.weights.tz.energy=1"], "names the level 'tz', which data.levels does not train"),
        (DATA, ["split.fractions=[0.8,0.1,0.2]"], "fractions must add up to 1, these add up to 1.1"),
        (DATA, ["elements=[H,H]"], "elements must name each element once"),
    ],
)
def test_settings_that_contradict_each_other(refused, base, overrides, words):
    assert words in refused(base, *overrides, command=COMMAND[base])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds NoneType, expected a mapping"),
        ("- 1\n", "holds list, expected a mapping"),
        ("a: [\n", "is not valid YAML"),
        ("\t", "is not valid YAML"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
        ("a: &x [*x]\n", "Circular reference"),
        ("2020-01-01: 3\n", "keys must be"),
        (RUN + "name: again\n", "the key 'name' stands there twice"),
        (RUN.replace("dz: EF", "dz: EF, dz: E"), "line 2: the key 'dz' stands there twice"),
        (RUN.replace("name: mf\n", ""), "the key 'name' is missing"),
        (RUN.replace("name: mf", "name: no"), "name: expected text"),
    ],
)
def test_a_wrong_file(refused, text, words):
    message = refused(text)
    assert words in message and "c.yaml" in message


def test_two_levels_with_one_name(refused):
    text = DATA.replace("levels: {cc: {energy: e}}", "levels:\n  cc: {energy: e}\n  cc: {energy: f}")
    assert "the key 'cc' stands there twice" in refused(text, command="shard")


@pytest.mark.parametrize("override", ["lr", "=3", "--"])
def test_an_override_without_key_or_value(refused, override):
    if override == "--":
        assert "is not of the form key=value" in refused(RUN, "--", "3")
    else:
        assert f"'{override}' is not of the form key=value" in refused(RUN, override)


def test_files_that_cannot_be_read(refused, tmp_path):
    assert "cannot read the config none.yaml: No such file" in refused(None, name="none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot read the config folder.yaml: Is a directory" in refused(None, name="folder.yaml")
    (tmp_path / "folder.yaml").rmdir()
    (tmp_path / "latin.yaml").write_bytes("name: Å\n".encode("latin-1"))
    assert "cannot read the config latin.yaml: 'utf-8'" in refused(None, name="latin.yaml")


def test_all_wrong_keys_are_named_at_once(refused):
    message = refused(RUN, "optim.lr=fast", "train.epoch=3", "engine.zero_stage=7")
    assert all(words in message for words in ("optim.lr", "train.epoch", "engine.zero_stage"))


# ------------------------------------------------------------------------------------------------------ right configs


def test_numbers_in_the_form_1e_3_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text(RUN + "optim: {lr: 1e-3, eps: 1E-9, weight_decay: 1.e+0, clip_norm: .5e1}\n")
    optim = load(RunConfig, tmp_path / "c.yaml").optim
    assert (optim.lr, optim.eps, optim.weight_decay, optim.clip_norm) == (1e-3, 1e-9, 1.0, 5.0)
    assert load(RunConfig, tmp_path / "c.yaml", ["optim.lr=2e-4"]).optim.lr == 2e-4


def test_paths_resolve_against_the_file_and_overrides_against_the_current_directory(tmp_path, monkeypatch):
    folder = tmp_path / "configs here"
    folder.mkdir()
    (folder / "c.yaml").write_text(RUN.replace("[a.zarr]", "[a.zarr, ../b.zarr, /abs/c.zarr]"))
    monkeypatch.chdir(tmp_path)
    stores = load(RunConfig, "configs here/c.yaml").data.stores
    assert [path.resolve() for path in stores] == [folder / "a.zarr", tmp_path / "b.zarr", Path("/abs/c.zarr")]
    assert load(RunConfig, folder / "c.yaml", ["data.stores=[d.zarr]"]).data.stores == (tmp_path / "d.zarr",)
    (folder / "d.yaml").write_text(DATA)
    data = load(DataConfig, folder / "d.yaml", ["out=y.zarr"])
    assert data.sources == (folder / "a.h5",) and data.out == tmp_path / "y.zarr"


def test_an_anchor_may_be_merged(tmp_path):
    (tmp_path / "c.yaml").write_text(
        RUN + "loss:\n  weights:\n    dz: &same {energy: 2, forces: 3}\n    cc: {<<: *same, forces: 1}\n"
    )
    weights = load(RunConfig, tmp_path / "c.yaml").loss.weights
    assert (weights["cc"].energy, weights["cc"].forces) == (2, 1)


def test_a_config_is_frozen(tmp_path):
    (tmp_path / "c.yaml").write_text(RUN)
    with pytest.raises(Exception, match="frozen"):
        load(RunConfig, tmp_path / "c.yaml").train.epochs = 3


def packaged() -> list[tuple[type, str]]:
    """(type, name) of every YAML that comes with the package."""
    names = [name for name in configs.listing() if name.endswith(".yaml")]
    return [(DataConfig if name.startswith("data/") else RunConfig, name) for name in names]


@pytest.mark.parametrize(("cls", "name"), packaged())
def test_what_is_dumped_loads_as_the_same_config(cls, name, tmp_path):
    config = load(cls, configs.path(name))
    (tmp_path / "dumped.yaml").write_text(dump(config))
    again = load(cls, tmp_path / "dumped.yaml")
    assert again == config
    assert dump(again) == dump(config)
    # every default is written out
    assert set(yaml.safe_load(dump(config))) == set(cls.model_fields)


def test_unknown_config_of_the_package():
    with pytest.raises(ConfigError, match=r"did you mean 'demo_sf\.yaml'"):
        configs.path("demo_s.yaml")


def test_configs_are_copied_once_and_never_over_changes(tmp_path):
    target = tmp_path / "mine"
    copies = configs.copy_to(target)
    assert [path.relative_to(target).as_posix() for path in copies] == configs.listing()
    configs.copy_to(target)  # nothing differs: nothing happens
    (target / "demo_sf.yaml").write_text("mine")
    (target / "demo_mf.yaml").unlink()
    with pytest.raises(ConfigError, match=r"other versions of demo_sf\.yaml; nothing was copied"):
        configs.copy_to(target)
    assert (target / "demo_sf.yaml").read_text() == "mine" and not (target / "demo_mf.yaml").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="it is a file"):
        configs.copy_to(tmp_path / "file")
