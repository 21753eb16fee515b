"""`python -m tozan` is `tozan`."""

import sys

from tozan.cli import main

sys.exit(main())
