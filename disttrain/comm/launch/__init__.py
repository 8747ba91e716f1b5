"""Launchers: how they tell a process its rank, and how they restart workers.

Everything that is specific to torchrun, mpirun, horovodrun or Slurm is here.
"""
