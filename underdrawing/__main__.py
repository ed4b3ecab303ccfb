"""`python -m underdrawing`: the command, where its script is not on the path."""

from underdrawing.cli import command

command()
