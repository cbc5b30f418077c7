"""Emptying a host: what is on disk of it, which both services of the host read, and the decisions, which are pure."""
