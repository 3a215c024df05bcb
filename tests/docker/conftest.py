"""The engine that has built the image."""

from collections.abc import Iterator

import pytest

from tests.docker import engines


@pytest.fixture(scope="session")
def engine() -> Iterator[engines.Engine]:
    """Built once, from the layers of earlier builds as far as they hold."""
    try:
        found = engines.find()
    except engines.NoEngine as e:
        pytest.skip(f"no image can be built: {e}")
    try:
        print(found.build()[-2000:])
        yield found
    finally:
        found.close()
