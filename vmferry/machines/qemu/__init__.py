"""QEMU as a machine: its description (``spec``), what a binary can do (``probe``), what it saves (``devicestate``).

The process itself is driven over QMP like the micro-VM's, by ``vmferry.machines.qmp``.
"""
