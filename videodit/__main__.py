"""`python -m videodit` is the same as `videodit`."""

import sys

from videodit.cli import main

if __name__ == "__main__":
    sys.exit(main())
