"""R15: jobs of two ranks that start on one machine at the same moment; none meets a process of another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

JOBS = {True: 8, False: 3}


@pytest.fixture(scope="module")
def alone(undisturbed, write_run, mpirun, tmp_path_factory):
    """(config, what it gives) of two runs that differ in their seed: ranks of one that meet the other's show it."""
    folder = tmp_path_factory.mktemp("other_seed")
    config = write_run(folder, train={"seed": 1})
    ended = mpirun(2, "train", config, "--run-dir", folder / "run")
    assert ended.returncode == 0, ended.output
    other = RunDir(folder / "run")
    assert "model" in differences(other, undisturbed.run_dir)
    return [(undisturbed.config, undisturbed.run_dir), (config, other)]


@pytest.fixture
def together(mpirun, tmp_path):
    """`together(configs, *settings, **options)` -> an `Ended` a config, in `tmp_path / "0"`, ...; all start at one
    moment."""

    def run(configs, *settings, **options):
        gate = threading.Barrier(len(configs))

        def one(number: int):
            gate.wait()
            return mpirun(2, "train", configs[number], *settings, "--run-dir", tmp_path / str(number), **options)

        with ThreadPoolExecutor(len(configs)) as pool:
            return list(pool.map(one, range(len(configs))))

    return run


@pytest.mark.fault("R15", sample=1, soak=5)
def test_jobs_that_start_together_keep_to_themselves(alone, together, tmp_path, draw, record_property):
    chosen = [alone[i % 2] for i in range(JOBS[draw.is_soak])]
    draw.rng.shuffle(chosen)
    ended = together([config for config, _ in chosen], timeout=600)
    assert [one.returncode for one in ended] == [0] * len(chosen), "\n".join(one.output for one in ended)
    for number, (_, expected) in enumerate(chosen):
        assert not differences(RunDir(tmp_path / str(number)), expected)
    record_property("jobs at the same time", len(chosen))


@pytest.mark.control("R15", broken="a port agreed beforehand, no token")
def test_a_fixed_port_is_seen_to_bring_jobs_together(alone, together, broken, tmp_path):
    # who has met a rank of another job waits for it once that one is gone: not for long here
    ended = together([config for config, _ in alone], "engine.timeout_minutes=0.25", program=broken("fixed_port"))
    assert [one.returncode for one in ended] != [0, 0]
    assert any("in use" in one.output for one in ended), "\n".join(one.output for one in ended)
