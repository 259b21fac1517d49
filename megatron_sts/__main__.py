"""``python -m megatron_sts`` is ``megatron-sts``; it must not know more than that."""

import sys

from megatron_sts.cli import main

if __name__ == "__main__":
    sys.exit(main())
