"""The compressors, one algorithm per file, and two base classes that several of them share.

Every module in this package is imported, which registers its compressors, so that adding an algorithm takes one file.
"""
