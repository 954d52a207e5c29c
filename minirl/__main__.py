"""`python -m minirl`, for `accelerate launch -m minirl run ...`."""

from minirl.cli import app

app()
