"""`python -m attnopt` is the command line."""

from attnopt.cli import main

if __name__ == "__main__":
    main()
