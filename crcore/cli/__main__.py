"""`python -m crcore.cli`, where the console script is not on the path."""

import sys

from crcore.cli import main

sys.exit(main())
