"""``python -m trajdist`` is the ``trajdist`` command."""

import sys

from trajdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
