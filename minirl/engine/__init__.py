"""The learn wing: model, learner and sampler.

Invariant: it knows nothing of methods, tasks or verifiers.
"""

import logging

# peft imports bitsandbytes, which warns on import of an optional kernel that it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
