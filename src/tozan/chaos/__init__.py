"""Faults on purpose: the same small training in peace and under a seeded script of faults, and whether they end alike.

`faults` writes the script, `inject` carries it out inside the ranks, `outside` from without, `run` compares, `report`
tells.
"""
