"""A run as a whole: its directory, its length and progress, and how it is started again or interrupted.

These files know nothing of models or gradients.
"""
