"""`python -m ksort_gguf`."""

import sys

from ksort_gguf.cli.main import main

sys.exit(main())
