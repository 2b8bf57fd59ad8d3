"""What `phalanx checkpoint` does to checkpoints that lie somewhere; torch-free.

Every action returns a report: what is printed, what `--json` writes, and whether all is well.
"""
