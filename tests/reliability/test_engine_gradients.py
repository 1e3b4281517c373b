"""R21: what DeepSpeed makes of energies, forces and accumulation is the gradient of plain torch."""

import json
from pathlib import Path

import pytest

from hpcmlip.config import RunConfig, from_values
from hpcmlip.errors import ConfigError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("gradients_worker.py")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def differences(ab_initio_store, launch, tmp_path_factory, run_values) -> dict[str, float]:
    """ "STAGE MICRO_BATCHES HOW" -> relative difference of the gradient on two ranks from that in float64."""
    out = tmp_path_factory.mktemp("gradients")
    (out / "config.json").write_text(json.dumps(run_values))
    launch(WORKER, out / "config.json", ab_initio_store, out, ranks=2)
    return json.loads((out / "differences.json").read_text())


@pytest.mark.fault("R21", sample=1, soak=1)
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_are_those_of_plain_torch_in_float64(differences, record_property, stage, accumulated):
    record_property("relative difference", f"{differences[f'{stage} {accumulated} inside']:.1e}")
    assert differences[f"{stage} {accumulated} inside"] < TOLERANCE


@pytest.mark.control("R21", broken="forces taken outside of the engine's module, ZeRO 1, 4 micro-batches")
def test_forces_outside_of_the_engine_are_caught(differences, record_property):
    record_property("relative difference", f"{differences['1 4 outside']:.1e}")
    assert differences["1 4 outside"] > 1e3 * TOLERANCE


@pytest.mark.fault("R21", sample=1, soak=1)
def test_stage_3_is_refused(run_values, tmp_path):
    values = run_values | {"data": run_values["data"] | {"stores": ["s.zarr"]}, "engine": {"zero_stage": 3}}
    with pytest.raises(ConfigError, match=r"engine.zero_stage.*stage 3 cannot train forces"):
        from_values(RunConfig, values, tmp_path, where="run.yaml")
