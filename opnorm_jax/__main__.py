"""``python -m opnorm_jax``: the command line, also installed as ``opnorm``."""

import sys

from opnorm_jax._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
