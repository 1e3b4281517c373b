"""docs/settings.md is what the classes say that check the settings."""

from pathlib import Path

from hpcmlip import configs, plugins, reference
from hpcmlip.config import RunConfig, flat, load

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def test_the_page_is_that_of_this_version():
    assert PAGE.read_text(encoding="utf-8") == reference.render(), (
        "the settings have changed: hpcmlip configs --keys > docs/settings.md"
    )


def test_every_key_of_a_config_is_there():
    page = reference.render()
    for kind in plugins.names("models"):
        config = load(RunConfig, configs.path(f"models/{kind}.yaml"))
        for key in flat(config.model_dump(mode="json")):
            section, _, rest = key.partition(".")
            by_level = section in ("data", "loss") or rest.startswith("hidden_of")
            known = f"{section}.{rest.partition('.')[0]}" if by_level else key
            assert f"- `{known}`" in page or key == "model.kind", key
