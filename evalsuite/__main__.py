"""`python -m evalsuite`: the command line, where the package is not installed."""

from evalsuite.cli.app import main

if __name__ == "__main__":
    main()
