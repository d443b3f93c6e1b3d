"""`python -m tune_hypergrad`: the command line from a checkout that is not installed."""

from tune_hypergrad.cli import main

if __name__ == "__main__":
    main()
