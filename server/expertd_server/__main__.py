"""`python -m expertd_server` is the `expertd` command."""

import sys

from expertd_server.cli import main

sys.exit(main())
