"""Updates of many hosts, one update domain at a time."""
