"""``python -m mmfm`` is the command ``mmfm``."""

import sys

from mmfm.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
