"""Surviving losses without hands: agents that restart ranks, and copies of their state in memory. Torch-free.

`slots` is the format of a copy, `node` starts and watches the ranks of one machine, `agent` decides what happens next.
"""
