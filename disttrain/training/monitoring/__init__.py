"""Monitoring a run: records and progress, evaluation, health checks, early stopping, plateaus.

Every decision made here depends only on numbers that are the same on all ranks.
"""
