"""What a run needs besides the method. Commands import this package before torch."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP reads it when torch is imported: waiting threads soon sleep
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
