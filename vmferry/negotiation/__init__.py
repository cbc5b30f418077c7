"""What stands between a machine and a destination, decided from facts alone. Pure.

``facts`` is what both hosts say, ``findings`` every finding there can be, the modules ``about_…`` find them, and
``report`` makes one report of all.
"""
