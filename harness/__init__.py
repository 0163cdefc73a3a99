"""What a run needs around the method. Every command reads this before torch."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # a thread that waits for another one spins for a moment, then sleeps
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
