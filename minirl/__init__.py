"""minirl: reinforcement learning of quantised LoRA adapters on one GPU."""

__version__ = "0.1.0"
