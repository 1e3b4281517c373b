"""`hpcmlip shard --scheduler slurm`: workers as jobs of a real Slurm, the same bytes as local ones."""

import pytest

from hpcmlip import configs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_slurm_workers_write_the_same_store(queue, cli, xtb_store, tmp_path):
    out = tmp_path / "xtb.zarr"
    env = {"SLURM_CONF": queue.env["SLURM_CONF"]}
    config = configs.path("data/xtb_tiny.yaml")
    cli("shard", config, f"out={out}", "--scheduler", "slurm", "--workers", 2, cwd=tmp_path, env=env)
    assert (out / "manifest.json").read_bytes() == (xtb_store / "manifest.json").read_bytes()
    queue.wait_empty(60)
