"""The image, built once for all tests, and two hosts in containers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.hosts import TwoContainers, two_containers
from tests.containers.podman import built_image
from tests.support import require
from vmferry.machines.qemu import guest


@pytest.fixture(scope="session")
def orderly_end() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl-C does, so that they tidy up: containers would outlive them."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def image(orderly_end: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of this checkout."""
    require(os.geteuid() == 0, "only root can make containers here")
    for command in ("podman", "runc", "nsenter", "ip"):
        require(shutil.which(command), f"{command} (apt install podman runc netavark aardvark-dns iproute2)")
    base = tmp_path_factory.getbasetemp()
    with built_image(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) as tag:
        yield tag


@pytest.fixture(scope="module")
def world(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoContainers]:
    """Two hosts in containers, for one module."""
    require(any(Path("/boot").glob("vmlinuz*")), "no kernel in /boot (apt install linux-image-cloud-amd64)")
    scratch = tmp_path_factory.mktemp("containers")
    (scratch / "images").mkdir()
    (scratch / "images/vmlinuz").write_bytes(guest.newest_kernel().read_bytes())
    (scratch / "images/initrd").write_bytes(guest.initramfs())
    with two_containers(image, scratch) as opened:
        yield opened
