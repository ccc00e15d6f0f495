"""``python -m riskcal``: the command line."""

from riskcal.cli import main

main()
