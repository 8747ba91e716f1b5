"""Monitoring a run: records and progress, health checks, early stopping, plateaus.

Every decision made here depends only on numbers that are the same on all ranks.
"""
