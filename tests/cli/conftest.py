"""A running hub, and an environment without the hub's variables."""

from collections.abc import Iterator

import pytest
from hub_process import HUB_VARIABLES, TIMEOUT_S, hub


@pytest.fixture(autouse=True)
def _no_hub_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="package")
def hub_url() -> Iterator[str]:
    """The URL of a hub with the publish tokens ``secret`` and ``other``."""
    with hub(time_limit=40 * TIMEOUT_S, ASGI_SSE_PUBLISH_TOKEN="secret other") as (_, url):
        yield url
