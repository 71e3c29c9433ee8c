"""``python -m patcher`` is the ``patcher`` command."""

import sys

from patcher.cli import program

if __name__ == "__main__":
    sys.exit(program())
