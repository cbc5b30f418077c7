"""Who is calling, what they may do, and how both are proved.

Start with ``authorization`` ("who may call what?"), then ``identity`` (what a name is) and ``tickets`` (what a
controller allows). ``tls`` and ``material`` put identities on the wire; ``authority`` makes them for demos and tests.
"""
