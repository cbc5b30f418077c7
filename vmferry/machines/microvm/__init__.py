"""The embedded micro-VM: a small machine of our own that runs real x86-64 code and can be migrated.

It is one process (``python -m vmferry.machines.microvm``), installed by pip alone, so that everything vmferry does
can be tried and tested where no QEMU is. Towards the host it looks like QEMU: RAM in a shared file and a QMP socket.
Start with ``machine`` (run states), then ``engine`` (how guest code runs), ``devices`` (what the guest sees; the
guest's view is in ``guests/machine.inc``) and ``devicestate`` (what leaves in a migration).
"""
