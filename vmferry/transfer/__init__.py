"""Moving pages: numbered frames on lanes, their acknowledgement, and when to stop copying.

``numbering`` and ``convergence`` are pure; ``frames`` turns pages into frames and back; ``lanes`` is the sending
side and ``intake`` the receiving side, each around the pure part.
"""
