"""``python -m batchnorm``: the command line."""

import sys

from _batchnorm_program import main

if __name__ == "__main__":
    sys.exit(main())
