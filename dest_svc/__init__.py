"""The endpoint a machine arrives at."""
