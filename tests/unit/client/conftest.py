"""What the tests of the client share: the same scripted service that the command line is tested with."""

from tests.unit.cli.conftest import certificates, source

__all__ = ["certificates", "source"]
