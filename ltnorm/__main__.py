"""`python -m ltnorm`."""

import sys

from ltnorm.cli import main

sys.exit(main())
