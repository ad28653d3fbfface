"""`python -m rx_edge.cli`."""

from rx_edge.cli import app

app()
