"""`python -m tsumugu` is `tsumugu`."""

import sys

from tsumugu.cli import main

if __name__ == "__main__":
    sys.exit(main())
