"""A run as a whole: its directory, length and progress, and how it is restarted or interrupted.

These files know nothing about models or gradients.
"""
