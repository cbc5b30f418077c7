"""The ``vmferry`` command: what people and scripts call."""
