"""Our own optimizer under DeepSpeed: two ranks at ZeRO 0, 1, 2 against plain torch, and read back from its state."""

import json
from pathlib import Path

import pytest
import safetensors.torch

from hpcmlip import configs
from hpcmlip.config import read_yaml

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("steps_worker.py")
CASE = {"micro_batches": 2, "steps": 8, "optim": {"kind": "yogi", "eps": 1e-3, "weight_decay": 1e-4}}
CASES = [
    {"name": f"{mode}.zero{stage}", "mode": mode, "stage": stage, **CASE}
    for stage in (0, 1, 2)
    for mode in ("engine", "restored")
]


@pytest.fixture(scope="module")
def parameters(ab_initio_store, launch, tmp_path_factory):
    """(case, ranks) -> parameters by name."""
    out = tmp_path_factory.mktemp("yogi")
    config = read_yaml(configs.path("demo_mf.yaml"))
    for ranks, cases in ((1, [{"name": "torch", "mode": "torch", **CASE}]), (2, CASES)):
        listing = out / f"cases{ranks}.json"
        listing.write_text(json.dumps({"config": config, "cases": cases}))
        launch(WORKER, listing, ab_initio_store, out, ranks=ranks)
    return lambda name, ranks: safetensors.torch.load_file(out / f"{name}.{ranks}.safetensors")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_same_as_plain_torch_and_the_same_bits_when_read_back(parameters, stage):
    found, restored = (parameters(f"{mode}.zero{stage}", 2) for mode in ("engine", "restored"))
    reference = parameters("torch", 1)
    worst = max(float((found[name] - p).norm() / p.norm()) for name, p in reference.items())
    print(f"ZeRO {stage}: {worst:.1e}")
    assert worst < 1e-5
    assert found.keys() == restored.keys() and all((found[name] == restored[name]).all() for name in found)
