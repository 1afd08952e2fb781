"""What the five scripts share. They import it before torch."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin for longer crawl on a busy machine (JOURNAL.md)
