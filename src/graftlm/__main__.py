"""`python -m graftlm`: the command line, as the script `graftlm`."""

from .cli import main

if __name__ == "__main__":
    main()
