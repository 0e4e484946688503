"""`python -m maft_adapter`, the command `maft-adapter`: for launchers such as `torchrun -m`."""

import sys

from .cli import main

sys.exit(main())
