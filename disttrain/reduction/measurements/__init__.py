"""Measurements while gradients are reduced: bytes on the wire, norms, and the error of compression."""
