"""The specification of the hand-off, explored exhaustively; it shares no code with what it specifies.

Start with ``rules`` (what each end does about each event), then ``world`` (what can happen), then ``promises``.
``python -m models`` runs everything, ``tests/simulation/test_conformance.py`` holds the real code against it.
"""
