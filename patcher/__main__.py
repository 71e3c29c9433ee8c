"""``python -m patcher`` is the ``patcher`` command."""

import sys

from patcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
