"""The names of what guest memory can be made of. Pure."""

from __future__ import annotations

from typing import Final

TMPFS: Final = "tmpfs"
"""A file in the host's ram_dir."""
HUGETLBFS: Final = "hugetlbfs"
"""A file of huge pages."""
MEMFD: Final = "memfd"
"""A shared file without a name."""
ANONYMOUS: Final = "anonymous"
"""Private memory, which nobody but its own process can read."""
