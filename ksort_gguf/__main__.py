"""`python -m ksort_gguf`."""

import sys

from ksort_gguf.cli import main

sys.exit(main())
