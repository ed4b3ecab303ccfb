"""`python -m underdrawing`: the command, where its script is not on the path."""

import sys

from underdrawing.cli import main

sys.exit(main())
