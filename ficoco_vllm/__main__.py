"""`python -m ficoco_vllm`: the command line."""

import sys

from ficoco_vllm.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
