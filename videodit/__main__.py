"""`python -m videodit` is the same as `videodit`."""

from videodit.cli import entry

if __name__ == "__main__":
    entry()
