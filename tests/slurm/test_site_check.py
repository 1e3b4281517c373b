"""`hpcmlip doctor` asks a real Slurm what it would take."""

import pytest

from hpcmlip.cluster import site_check

pytestmark = [pytest.mark.slurm]


@pytest.mark.parametrize(
    ("site", "state", "said"),
    [
        ('{nodes: 2, tasks_per_node: 2, time: "30"}', "ok", ["2 x (2 cores) for 30: 2 such nodes", "to start at"]),
        ("{partition: mian}", "error", ["none named 'mian' (did you mean 'main'?"]),
        ("{nodes: 3}", "error", ["3 nodes of 2 cores asked for; there are 2 of 4 cores, 4096 MB, 0 GPUs"]),
        # what the table of sinfo does not show
        ("{sbatch_options: [--constraint=icelake]}", "error", ["sbatch would refuse it", "feature"]),
    ],
)
def test_a_site_on_a_real_slurm(queue, monkeypatch, tmp_path, site, state, said):
    monkeypatch.setenv("SLURM_CONF", str(queue.conf))
    path = tmp_path / "site.yaml"
    path.write_text(site)
    found = site_check.slurm(path)
    assert state in {item.state for item in found}, found
    if state == "ok":
        assert {item.check for item in found} == {"members", "evaluation", "train job", "evaluate job"}
        assert {item.state for item in found} == {"ok"}, found
    text = "\n".join(item.text for item in found)
    assert all(words in text for words in said), text
    assert not queue.jobs()
