"""What the five scripts share. They import it before torch."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin: 11 times slower on a busy machine (JOURNAL.md)
