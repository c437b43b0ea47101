"""Parameter-efficient training for fast.ai"""

__version__ = "0.0.1"
