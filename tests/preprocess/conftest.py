import many_shards as sample
import pytest


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory) -> sample.ManyShards:
    """Read only."""
    return sample.make(tmp_path_factory.mktemp("many_shards"))
