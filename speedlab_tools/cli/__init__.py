"""The command line of run.py. Standard library only: it runs before anything is installed."""
