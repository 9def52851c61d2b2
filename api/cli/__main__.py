"""`python -m api.cli` is `aigc`."""

from api.cli.main import main

main()
