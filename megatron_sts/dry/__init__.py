"""Runs a training step of one rank of any world, without devices and peers, and counts what it does. Knows no formula of what it should do.

``cost/`` says from shapes alone what a step costs, this room from the operations that were executed: neither reads the other,
so that the two can check each other.
"""
