"""Measurements of this machine, each a JSON file that says where it comes from (`result`, which needs no torch)."""
