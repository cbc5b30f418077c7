"""Recovery as an operator meets it: what a host knows of a machine, what blocks it, and settling it now.

Everything here asks and shows; what is done is what the services would do by themselves, through their own decisions.
"""
