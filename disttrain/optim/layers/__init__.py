"""Layer-wise settings: learning rates, weight decay and freezing by rules on parameter names.

Layers can be unfrozen during training.
"""
