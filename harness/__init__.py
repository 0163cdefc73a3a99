"""What a run needs besides the method. Commands import this package before torch."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported: idle threads spin only briefly
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
