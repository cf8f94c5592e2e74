"""Experiments that show what batch norm does: `python -m experiments --help`."""
