"""The compressors, one algorithm per file, and two base classes that several of them share.

Every module in this package is imported and its compressors are registered, so a new file is all that a new
algorithm needs.
"""
