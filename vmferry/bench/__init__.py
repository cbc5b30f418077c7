"""Measuring migrations beside the hypervisor's own: the same guest, on the same computer, in turn, in one run.

``guest`` makes the guest, ``network`` the links, ``ours`` and ``peer`` move it, ``observer`` and ``ticks`` tell what
it saw, ``usage`` what it cost, ``figures`` and ``table`` what came out; ``compare`` puts them together.
"""
