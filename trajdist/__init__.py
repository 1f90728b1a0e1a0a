"""trajdist: learns how images move through a frozen backbone, and finds the places that do not belong."""

__version__ = "0.1.0"
