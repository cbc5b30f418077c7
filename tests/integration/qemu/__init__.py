"""Tests with real QEMU machines."""
