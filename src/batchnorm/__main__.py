"""``python -m batchnorm``: the command line."""

import sys

from batchnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
