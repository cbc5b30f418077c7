"""What the hostile suites share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.hostile.raw_source import Lane, Model, RawSource, make_model, raw_source
from tests.integration.hosts import Bystander, World


@pytest.fixture(scope="module")
async def model() -> Model:
    """What a machine's device state looks like."""
    return await make_model()


@pytest.fixture
async def source(world: World, bystander: Bystander, model: Model) -> AsyncIterator[RawSource]:
    """An attempt to come to host b; afterwards b holds nothing of it, and the bystander is well."""
    async with raw_source(world, world.b, model) as source:
        yield source
    await source.until_nothing_is_held()
    await bystander.assert_unharmed()


@pytest.fixture
async def lane(source: RawSource) -> Lane:
    """The first lane of an attempt that was begun."""
    await source.begin()
    return await source.open_lane()
