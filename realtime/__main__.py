"""`python -m realtime`: the command line."""

from realtime.cli import main

main()
