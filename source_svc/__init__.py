"""The endpoint a machine leaves."""
