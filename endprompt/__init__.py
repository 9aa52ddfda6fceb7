"""EndPrompt (arXiv 2605.14589) at scale: the method, independent of the training engine."""

__version__ = "0.1.0"
