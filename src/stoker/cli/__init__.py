"""The command line: `main.py` and one thin file a command."""
