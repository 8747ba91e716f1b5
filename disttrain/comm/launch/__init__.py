"""Launchers: how they tell a process its rank, which ranks share a node, and how workers are restarted.

Everything that is specific to torchrun, mpirun, horovodrun or Slurm is here.
"""
