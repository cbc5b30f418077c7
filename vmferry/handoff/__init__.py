"""The hand-off: who may run a machine, and how that right moves from one host to another.

Start with ``gate`` ("who may run the guest?"), then ``states`` (the protocol and its diagrams).
"""
