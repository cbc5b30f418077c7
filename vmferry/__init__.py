"""vmferry moves running virtual machines between hosts and hands their ownership over atomically."""

__version__ = "0.1.0"
