"""Guest memory: where it is, which pages were written, and what they contain.

Promise: memory is read and written through file descriptors with buffers of bounded size, never through a
mapping, so that a service stays small whatever the size of the machine; and no tracker in here loses a write
that its docstring does not name.

Exports by module: ``runs`` (sets of pages), ``regions`` (RAM files and where a machine maps them), ``digest``
(a digest for each page), ``trackers`` (which pages were written), ``probe`` (which tracker works here).
"""
