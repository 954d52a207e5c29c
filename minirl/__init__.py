"""minirl: reinforcement learning of quantised LoRA adapters on one GPU."""

import logging

__version__ = "0.1.0"

# Whatever imports peft imports bitsandbytes, which warns about an optional kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
