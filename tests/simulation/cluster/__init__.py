"""The real services of a few hosts on a simulated clock, disk, network and hypervisor, and faults that strike."""
