"""Checkout shim: `python cli.py ...` runs the command line without installing."""

from rx_edge.cli import app

if __name__ == "__main__":
    app()
