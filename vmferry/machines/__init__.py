"""Machines: what they are, where they live on a host, and how their processes are driven.

Start with ``port`` (what the rest of vmferry may ask of a machine), then ``spec`` (what a machine is made
of), ``directory`` (the machines of a host) and ``launcher`` (starting and stopping them).
"""
