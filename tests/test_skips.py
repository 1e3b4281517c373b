"""Under HPCMLIP_REQUIRE_ALL=1, which .ci/run sets, a test that skips is a test that failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = {
    "call": "import pytest\ndef test():\n    pytest.skip('no slurm')\n",
    "mark": "import pytest\n@pytest.mark.skipif(True, reason='no slurm')\ndef test():\n    pass\n",
    "fixture": "import pytest\n@pytest.fixture\ndef f():\n    pytest.skip('no slurm')\ndef test(f):\n    pass\n",
    "module": "import pytest\npytest.importorskip('no_such_module', reason='no slurm')\ndef test():\n    pass\n",
}


@pytest.mark.parametrize("required", ["1", "0"])
def test_skips(tmp_path, required):
    for name in ("conftest.py", "soak.py", "runs.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    for kind, text in SKIPS.items():
        (tmp_path / f"test_{kind}.py").write_text(text + "def test_other():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "."],
        cwd=tmp_path,
        env=os.environ | {"HPCMLIP_REQUIRE_ALL": required},
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    if required == "1":
        assert done.returncode == 1 and "1 failed, 3 passed, 3 errors" in done.stdout
        assert done.stdout.count("allows no skip, but") >= len(SKIPS)
    else:
        assert done.returncode == 0 and "3 passed, 4 skipped" in done.stdout
        assert "left out: 4 tests, because: no slurm" in done.stdout
