"""`python -m sedimo.cli` is the `sedimo` command."""

from sedimo.cli.main import main

main()
